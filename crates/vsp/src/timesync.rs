//! Time synchronisation: samples of the host's time every five seconds, and a request to set the clock after the start,
//! a pause and a restore.

use crate::ic::{Definition, Ic, Periodic, service, v};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vmbus::protocol::class;
use vmbus::protocol::service::{ServiceVersion, kind};

static DEFINITION: Definition = Definition {
    name: "timesync",
    class: class::TIME_SYNC,
    instance: class::TIME_SYNC_INSTANCE,
    kind: kind::TIME_SYNC,
    versions: &[v(1, 0), v(3, 0), v(4, 0)],
};

const INTERVAL: Duration = Duration::from_secs(5);
/// 100 ns units from 1601 to 1970.
const UNIX_EPOCH_IN_FILETIME: u64 = 116_444_736_000_000_000;
/// Set the clock.
const FLAG_SYNC: u8 = 1;
/// A sample.
const FLAG_SAMPLE: u8 = 2;

/// Reads the guest's reference time, in 100 ns units.
pub type ReferenceTime = Box<dyn Fn() -> u64 + Send + Sync>;

/// The service.
pub struct TimeSync {
    pub(crate) ic: Arc<Ic>,
}

/// Requests to set the clock in a row. A guest sets it some time after it has worked out what to set; where its processor
/// was taken away in between, the second request mends that.
const SYNCS: u8 = 2;
/// Time between them.
const SYNC_INTERVAL: Duration = Duration::from_millis(500);
/// Tries to read both clocks without having been interrupted in between, and how near is near enough (100 ns units).
const TRIES: u32 = 8;
const NEAR: u64 = 1000;

struct Sampler {
    reference: ReferenceTime,
    syncs: AtomicU8,
}

impl Sampler {
    /// The host's time and the reference time of the same moment.
    fn both(&self) -> (Duration, u64) {
        let read = || {
            let before = (self.reference)();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let after = (self.reference)();
            let width = after.saturating_sub(before);
            (width, now, before + width / 2)
        };
        let mut best = read();
        for _ in 1..TRIES {
            if best.0 <= NEAR {
                break;
            }
            best = std::cmp::min_by_key(best, read(), |sample| sample.0);
        }
        (best.1, best.2)
    }
}

impl Periodic for Sampler {
    fn next(&self, version: ServiceVersion, first: bool) -> (Option<Vec<u8>>, Duration) {
        if first {
            self.syncs.store(SYNCS, Ordering::Relaxed);
        }
        // One thread asks: nobody counts in between.
        let left = self.syncs.load(Ordering::Relaxed);
        self.syncs.store(left.saturating_sub(1), Ordering::Relaxed);
        let (flags, interval) = match left {
            0 => (FLAG_SAMPLE, INTERVAL),
            1 => (FLAG_SYNC, INTERVAL),
            _ => (FLAG_SYNC, SYNC_INTERVAL),
        };
        let (since_1970, reference) = self.both();
        let now = UNIX_EPOCH_IN_FILETIME + (since_1970.as_nanos() / 100) as u64;
        let mut body = now.to_le_bytes().to_vec();
        if version >= v(4, 0) {
            // With the reference time of the sample; leap indicator 0, stratum 1.
            body.extend(reference.to_le_bytes());
            body.extend([flags, 0, 1, 0, 0, 0]);
        } else {
            // Child time and round trip, which guests leave alone.
            body.extend([0; 16]);
            body.push(flags);
        }
        (Some(body), interval)
    }
    fn answered(&self, _: &[u8]) {}
}

impl TimeSync {
    /// The service, not connected.
    pub fn new(reference: ReferenceTime) -> Arc<Self> {
        Arc::new(Self { ic: Ic::new(&DEFINITION, Some(Arc::new(Sampler { reference, syncs: AtomicU8::new(0) }))) })
    }
}

service!(TimeSync);
