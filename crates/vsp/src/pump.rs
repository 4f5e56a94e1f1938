//! The thread of a device that has one channel: it lives as long as the guest keeps the channel open.

use crate::lock;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vmbus::{Channel, OpenRefused};

/// The channel, while it is open, and its thread.
#[derive(Default)]
pub(crate) struct Pump(Mutex<Open>);

#[derive(Default)]
struct Open {
    channel: Option<Arc<Channel>>,
    thread: Option<JoinHandle<()>>,
}

impl Pump {
    /// The channel, if it is open.
    pub fn channel(&self) -> Option<Arc<Channel>> {
        lock(&self.0).channel.clone()
    }

    /// The guest has opened the channel: `serve` runs on a thread of its own until it is closed.
    pub fn start(
        &self,
        name: &str,
        channel: Arc<Channel>,
        serve: impl FnOnce(&Channel) + Send + 'static,
    ) -> Result<(), OpenRefused> {
        // The thread may serve at once, but nobody finds the channel before it has its thread.
        let mut open = lock(&self.0);
        let its = channel.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || serve(&its));
        open.thread = Some(thread.map_err(|e| OpenRefused(e.to_string()))?);
        open.channel = Some(channel);
        Ok(())
    }

    /// The channel is closed: waits until the thread has ended.
    pub fn stop(&self) {
        let thread = {
            let mut open = lock(&self.0);
            open.channel = None;
            open.thread.take()
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}
