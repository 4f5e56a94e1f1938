//! Screen and keyboard of a running machine, as a person has them.

use bios::device::BiosDevice;
use console::keys::{self, KeyError};
use console::picture::{Layout, png};
use machine::layout::frame_buffer;
use partition::{Gpa, GuestMemory};
use std::sync::Arc;
use vsp::keyboard::Stroke;

/// The linear frame buffer of a generation 2 machine.
pub struct Screen {
    memory: Arc<GuestMemory>,
    bios: Arc<BiosDevice>,
}

impl Screen {
    /// The screen of a machine with this memory and firmware.
    pub fn new(memory: Arc<GuestMemory>, bios: Arc<BiosDevice>) -> Self {
        Self { memory, bios }
    }

    /// What is shown now, as a PNG. `None` if the firmware has set a size that the frame buffer cannot hold.
    pub fn png(&self) -> Option<Vec<u8>> {
        let native = (frame_buffer::WIDTH, frame_buffer::HEIGHT);
        let (width, height) = self.bios.screen().map_or(native, |(w, h)| (u32::from(w), u32::from(h)));
        let layout = Layout { width, height, stride: width * 4 };
        let bytes = layout.bytes().filter(|b| *b as u64 <= frame_buffer::SIZE)?;
        let mut pixels = vec![0; bytes];
        self.memory.read(Gpa(frame_buffer::BASE), &mut pixels).ok()?;
        png(layout, &pixels)
    }
}

/// Text and names of keys as strokes.
///
/// # Errors
/// For what the keyboard does not have.
pub fn strokes(text: &str, names: &[String]) -> Result<Vec<Stroke>, KeyError> {
    let mut strokes = keys::text(text)?;
    for name in names {
        strokes.extend(keys::named(name)?);
    }
    Ok(strokes.iter().map(|s| Stroke { code: s.code, extended: s.extended, down: s.down }).collect())
}
