//! The synthetic keyboard (facts: Linux `drivers/input/serio/hyperv-keyboard.c`): scan codes of set 1 in packets.

use super::channel::Channel;
use crate::cell::Global;
use crate::console::input::{Key, has_room, push, scan, shift};
use uefi_core::bytes::{u16_at, u32_at};
use vmbus_protocol::message::Offer;

/// Message types.
mod kind {
    pub const PROTOCOL_REQUEST: u32 = 1;
    pub const PROTOCOL_RESPONSE: u32 = 2;
    pub const EVENT: u32 = 3;
}
const VERSION: u32 = 0x0001_0000;
/// Bits of an event's information.
const IS_UNICODE: u32 = 1;
const IS_BREAK: u32 = 2;
const IS_E0: u32 = 4;

struct State {
    channel: Option<Channel>,
    shift: u32,
    caps: bool,
}

static STATE: Global<State> = Global::new(State { channel: None, shift: 0, caps: false });

/// Opens the channel and asks for the protocol.
pub fn start(offer: &Offer) {
    let Some(channel) = Channel::open(offer) else {
        crate::log!("keyboard: the channel cannot be opened");
        return;
    };
    let mut m = [0; 8];
    m[..4].copy_from_slice(&kind::PROTOCOL_REQUEST.to_le_bytes());
    m[4..].copy_from_slice(&VERSION.to_le_bytes());
    channel.send(1, true, &m);
    STATE.with(|s| s.channel = Some(channel));
}

/// Forgets the channel.
pub fn stop() {
    STATE.with(|s| s.channel = None);
}

/// Takes what the keyboard has sent.
pub fn poll() {
    while has_room()
        && let Some(p) = STATE.with(|s| s.channel.as_ref().and_then(Channel::receive))
    {
        match u32_at(&p.payload, 0) {
            Some(kind::PROTOCOL_RESPONSE) if u32_at(&p.payload, 4).unwrap_or(0) & 1 == 0 => {
                crate::log!("keyboard: the host refuses the protocol");
            }
            Some(kind::EVENT) => {
                if let (Some(code), Some(info)) = (u16_at(&p.payload, 4), u32_at(&p.payload, 8))
                    && let Some(key) = STATE.with(|s| s.event(code, info))
                {
                    push(key);
                }
            }
            _ => {}
        }
    }
}

/// Characters of scan codes 0x02 to 0x35, without and with shift (US layout).
const PLAIN: &[u8; 52] = b"1234567890-=\x08\tqwertyuiop[]\r\0asdfghjkl;'`\0\\zxcvbnm,./";
const SHIFTED: &[u8; 52] = b"!@#$%^&*()_+\x08\tQWERTYUIOP{}\r\0ASDFGHJKL:\"~\0|ZXCVBNM<>?";

impl State {
    fn event(&mut self, code: u16, info: u32) -> Option<Key> {
        let down = info & IS_BREAK == 0;
        let toggle = if self.caps { 4 } else { 0 };
        if info & IS_UNICODE != 0 {
            return down.then_some(Key { unicode: code, shift: self.shift, toggle, scan: 0 });
        }
        let e0 = info & IS_E0 != 0;
        let modifier = match (code, e0) {
            (0x2a, false) => shift::LEFT_SHIFT,
            (0x36, false) => shift::RIGHT_SHIFT,
            (0x1d, false) => shift::LEFT_CONTROL,
            (0x1d, true) => shift::RIGHT_CONTROL,
            (0x38, false) => shift::LEFT_ALT,
            (0x38, true) => shift::RIGHT_ALT,
            _ => 0,
        };
        if modifier != 0 {
            self.shift = if down { self.shift | modifier } else { self.shift & !modifier };
            return None;
        }
        if !down {
            return None;
        }
        let shifted = self.shift & (shift::LEFT_SHIFT | shift::RIGHT_SHIFT) != 0;
        let (scan, unicode) = match (code, e0) {
            (0x01, false) => (scan::ESC, 0),
            (0x39, false) => (0, u16::from(b' ')),
            (0x3a, false) => {
                self.caps = !self.caps;
                return None;
            }
            (0x3b..=0x44, false) => (scan::F1 + code - 0x3b, 0),
            (0x57, false) => (scan::F11, 0),
            (0x58, false) => (scan::F12, 0),
            (0x48, _) => (scan::UP, 0),
            (0x50, _) => (scan::DOWN, 0),
            (0x4b, _) => (scan::LEFT, 0),
            (0x4d, _) => (scan::RIGHT, 0),
            (0x47, _) => (scan::HOME, 0),
            (0x4f, _) => (scan::END, 0),
            (0x49, _) => (scan::PAGE_UP, 0),
            (0x51, _) => (scan::PAGE_DOWN, 0),
            (0x52, _) => (scan::INSERT, 0),
            (0x53, _) => (scan::DELETE, 0),
            (0x1c, true) => (0, 13),
            (0x35, true) => (0, u16::from(b'/')),
            (0x37, false) => (0, u16::from(b'*')),
            (0x4a, false) => (0, u16::from(b'-')),
            (0x4e, false) => (0, u16::from(b'+')),
            (0x02..=0x35, false) => {
                let i = usize::from(code - 2);
                let letter = PLAIN[i].is_ascii_lowercase();
                let c = if shifted != (letter && self.caps) { SHIFTED[i] } else { PLAIN[i] };
                if c == 0 {
                    return None;
                }
                (0, u16::from(c))
            }
            _ => return None,
        };
        Some(Key { scan, unicode, shift: self.shift, toggle })
    }
}
