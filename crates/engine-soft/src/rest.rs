//! A VP at rest gives back what it holds for speed: decoded instructions, translations and jump tables, which busy times
//! have filled, are rebuilt as far as the guest needs them again.
//!
//! A host may have many machines that idle. Each is looked at every few seconds of its own idle time, and only while it
//! holds much: what an idle guest executes fits below that, so that it is not dropped again and again.

use crate::vp::SoftVp;
use partition::clock::host_tsc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a VP is watched.
const WINDOW: Duration = Duration::from_secs(5);
/// At rest is who has executed for less than one part in this of the time.
const SHARE: u64 = 50;
/// Less than this need not be given back.
const MUCH: usize = 2 << 20;

/// The time that is being looked at.
#[derive(Debug, Default)]
pub struct Watch {
    /// Host TSC at its beginning; 0 if it has not begun.
    since: u64,
    /// What the VP had executed then, in ticks of the host's TSC.
    ran: u64,
}

/// Blocks of the heap from this size on are mappings of their own, which are fresh zeros and go back to the host when
/// they are freed. The C library would otherwise raise the limit (128 KiB) to the largest block that was ever freed: tables
/// that are mostly empty would come from its heaps, written over with zeros and so all resident.
pub fn keep_tables_apart() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: sets a limit for later allocations; what is allocated already is freed as it was made.
        let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10) };
    });
}

/// Called when a VP has nothing to do. Says how long it may sleep before it is to be called again; `None`: as long as it
/// likes.
pub fn at_rest(vp: &mut SoftVp) -> Option<Duration> {
    let held = vp.decoded.held() + vp.translator.as_ref().map_or(0, |t| t.held());
    if held < MUCH {
        vp.watch.since = 0;
        return None;
    }
    let (now, ran) = (host_tsc(), vp.partition.shared(vp.index).runtime.load(Ordering::Relaxed));
    let window = (vp.partition.clock.tsc_frequency_hz()).saturating_mul(WINDOW.as_secs());
    let elapsed = now.saturating_sub(vp.watch.since);
    if vp.watch.since == 0 || elapsed >= window {
        let busy = ran.saturating_sub(vp.watch.ran) > elapsed / SHARE;
        if vp.watch.since != 0 && !busy {
            release(vp);
            vp.watch.since = 0;
            return None;
        }
        vp.watch = Watch { since: now, ran };
    }
    Some(WINDOW)
}

/// Gives everything back. No instruction may be executing.
fn release(vp: &mut SoftVp) {
    if let Some(translator) = &mut vp.translator {
        translator.release();
    }
    vp.release_jumps();
    // Return addresses of translated code mean nothing any more.
    vp.s.jit.shadow_epoch = 0;
    vp.decoded.clear();
    // SAFETY: gives free pages of the C library's heaps back to the host; touches nothing that is in use.
    unsafe { libc::malloc_trim(0) };
}
