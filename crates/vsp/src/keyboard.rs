//! The synthetic keyboard: the host types, the guest gets scan codes of set 1.
//!
//! Protocol 1.0 (Linux `drivers/input/serio/hyperv-keyboard.c`): the guest asks for a version, the host accepts, then each
//! stroke is a packet. What is typed before a driver is there is refused: nobody would know when it arrives.

use crate::pump::Pump;
use crate::{SyntheticDevice, from_value, lock, to_value};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};
use thiserror::Error;
use vmbus::protocol::USER_DATA;
use vmbus::protocol::class;
use vmbus::protocol::message::offer_flags;
use vmbus::protocol::ring::packet;
use vmbus::{Channel, ChannelDevice, Next, OfferKey, OfferParams, OpenRefused};

/// Message types.
mod kind {
    pub const PROTOCOL_REQUEST: u32 = 1;
    pub const PROTOCOL_RESPONSE: u32 = 2;
    pub const EVENT: u32 = 3;
    pub const LEDS: u32 = 4;
}
/// The one version: major in the upper half.
const VERSION: u32 = 0x0001_0000;
const ACCEPTED: u32 = 1;
/// Bits of a stroke's information.
const IS_BREAK: u32 = 2;
const IS_E0: u32 = 4;
/// Most strokes at once: text that a person would type, not a file.
pub const MOST_STROKES: usize = 8192;

/// A key goes down or up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stroke {
    /// Make code of set 1.
    pub code: u16,
    /// With the prefix E0.
    pub extended: bool,
    /// Down, or up.
    pub down: bool,
}

/// Why keys do not reach the guest.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyboardError {
    /// No driver.
    #[error("the guest has no driver for the synthetic keyboard (yet)")]
    NotConnected,
    /// Too many.
    #[error("{0} strokes at once, the most are {MOST_STROKES}: type less")]
    TooMany(usize),
    /// The channel went away.
    #[error("the guest closed the keyboard: {0}")]
    Closed(String),
}

#[derive(Default)]
struct Inner {
    accepted: bool,
    /// Bit 0 scroll lock, 1 num lock, 2 caps lock.
    leds: u16,
}

#[derive(Serialize, Deserialize)]
struct State {
    accepted: bool,
    leds: u16,
}

/// The keyboard.
pub struct Keyboard {
    inner: Arc<Mutex<Inner>>,
    pump: Pump,
}

impl Keyboard {
    /// A keyboard that no guest listens to yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { inner: Arc::default(), pump: Pump::default() })
    }

    /// Has the guest a driver?
    pub fn is_connected(&self) -> bool {
        lock(&self.inner).accepted && self.pump.channel().is_some()
    }

    /// Types.
    pub fn send(&self, strokes: &[Stroke]) -> Result<(), KeyboardError> {
        if strokes.len() > MOST_STROKES {
            return Err(KeyboardError::TooMany(strokes.len()));
        }
        // Under the lock: two callers' keys do not mix.
        let inner = lock(&self.inner);
        let channel = self.pump.channel().filter(|_| inner.accepted).ok_or(KeyboardError::NotConnected)?;
        for stroke in strokes {
            let mut info = 0;
            if !stroke.down {
                info |= IS_BREAK;
            }
            if stroke.extended {
                info |= IS_E0;
            }
            let mut message = kind::EVENT.to_le_bytes().to_vec();
            message.extend(stroke.code.to_le_bytes());
            message.extend([0; 2]);
            message.extend(u32::to_le_bytes(info));
            channel.send(packet::IN_BAND, 0, 0, &message).map_err(|e| KeyboardError::Closed(e.to_string()))?;
        }
        Ok(())
    }

    fn serve(inner: &Mutex<Inner>, channel: &Channel) {
        loop {
            match channel.next(None) {
                Next::Packet(packet) => Self::received(inner, channel, &packet.payload),
                Next::Woken | Next::Timeout => {}
                Next::Closed => break,
            }
        }
        lock(inner).accepted = false;
    }

    fn received(inner: &Mutex<Inner>, channel: &Channel, payload: &[u8]) {
        let word = |at: usize| payload.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        match word(0) {
            Some(kind::PROTOCOL_REQUEST) => {
                let accepted = word(4) == Some(VERSION);
                lock(inner).accepted = accepted;
                let mut answer = kind::PROTOCOL_RESPONSE.to_le_bytes().to_vec();
                answer.extend(if accepted { ACCEPTED } else { 0 }.to_le_bytes());
                // A channel that is closed at once says so to the thread.
                let _ = channel.send(packet::IN_BAND, 0, 0, &answer);
            }
            Some(kind::LEDS) => {
                if let Some(leds) = word(4) {
                    lock(inner).leds = leds as u16 & 7;
                }
            }
            // A guest's nonsense is its own affair.
            _ => {}
        }
    }
}

impl ChannelDevice for Keyboard {
    fn offer(&self) -> OfferParams {
        OfferParams {
            key: OfferKey { class: class::KEYBOARD, instance: class::KEYBOARD_INSTANCE, sub_channel: 0 },
            flags: offer_flags::ENUMERATE,
            mmio_megabytes: 0,
            user_data: [0; USER_DATA],
            monitored: false,
        }
    }

    fn opened(&self, channel: Arc<Channel>) -> Result<(), OpenRefused> {
        let inner = self.inner.clone();
        if !channel.is_restored() {
            lock(&self.inner).accepted = false;
        }
        self.pump.start("keyboard", channel, move |channel| Self::serve(&inner, channel))
    }

    fn closed(&self, _: u16) {
        self.pump.stop();
    }
}

impl SyntheticDevice for Keyboard {
    fn name(&self) -> &str {
        "keyboard"
    }
    fn save(&self) -> Result<ciborium::Value, String> {
        let inner = lock(&self.inner);
        to_value(&State { accepted: inner.accepted, leds: inner.leds })
    }
    fn restore(&self, state: &ciborium::Value) -> Result<(), String> {
        let state: State = from_value(state)?;
        let mut inner = lock(&self.inner);
        inner.accepted = state.accepted;
        inner.leds = state.leds;
        Ok(())
    }
}
