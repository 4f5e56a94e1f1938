//! Counters of a VP, for `viridian run --stats`: what it did, and where its time went.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Count { $($(#[$doc])* $name,)* }

        /// Names for people, by [`Count`].
        const NAMES: &[&str] = &[$($text,)*];
    };
}

counts! {
    /// Translated code returned to the run loop.
    Leaves = "returns to the run loop",
    /// A direct jump whose target was not known yet.
    Direct = "direct jumps resolved",
    /// A direct jump to another page whose link was not entered.
    Links = "direct jumps to other pages resolved",
    /// A jump through the table that missed.
    Table = "jump table misses",
    /// System instructions executed by a call, after which translated code went on elsewhere.
    System = "system instructions called",
    /// Blocks that went on elsewhere after an instruction in their middle (a fault, mostly).
    Diverted = "blocks left in the middle",
    /// Instructions that the interpreter executed in the middle of a block (TLB misses among them).
    Interpreted = "instructions interpreted in blocks",
    /// Blocks translated.
    Blocks = "blocks translated",
    /// Guest instructions in them.
    Translated = "instructions translated",
    /// Times the whole code cache was dropped.
    CacheFlushes = "code cache flushes",
    /// Blocks dropped because their code changed.
    Dropped = "blocks dropped (code changed)",
    /// Page walks.
    Walks = "page walks",
    /// Page faults delivered.
    PageFaults = "page faults",
    /// Other exceptions delivered.
    Exceptions = "other exceptions",
    /// Loads of CR3 that kept the translations of the new address space.
    SpacesKept = "address spaces kept (CR3)",
    /// Loads of CR3 that dropped them.
    SpacesFlushed = "address spaces flushed (CR3)",
    /// INVLPG and INVPCID of one address.
    PageFlushes = "pages flushed",
    /// Everything dropped, global pages or not.
    FullFlushes = "TLB flushes",
    /// Blocks compared by [`crate::translate::verify`].
    Verified = "blocks verified",
    /// Executions that could not be compared.
    Unverified = "blocks not verifiable",
    /// Comparisons made again.
    Retried = "verifications repeated",
    /// Faults at which a translation had lost status flags.
    FlagsLost = "faults with status flags lost",
    /// Address spaces that were tried for direct execution.
    DirectSpaces = "address spaces executed directly",
    /// Times that direct execution was entered.
    DirectRuns = "direct executions",
    /// Instructions that stopped it and were interpreted.
    DirectSingles = "instructions interpreted for them",
    /// Changes of what is mapped for it.
    DirectChanges = "mappings made for them",
    /// Times that code that cannot be executed directly was left to the translator until it left its page.
    DirectAsides = "pages left to the translator",
    /// Times that an address space was put aside for some interrupts.
    DirectSuspends = "direct executions put aside",
    /// Host TSC ticks in user code executed directly.
    DirectTicks = "% of time in user code executed directly",
    /// Host TSC ticks around it: going in, coming back, and what stopped it, as far as it was seen to there.
    DirectAround = "% of time going in and coming back",
    /// Host TSC ticks of these in making mappings.
    DirectMapTicks = "% of time making mappings for it",
    /// Host TSC ticks of these in looking code through.
    DirectScanTicks = "% of time looking code through",
    /// Host TSC ticks in translation.
    TranslateTicks = "% of time translating",
    /// Host TSC ticks in calls from translated code (measured at one call in 64).
    CallTicks = "% of time in calls from translated code",
    /// Host TSC ticks in exits to the machine.
    ExitTicks = "% of time in devices",
    /// Host TSC ticks in translated code, calls included.
    CodeTicks = "% of time in translated code",
}

/// Number of counters.
pub const LEN: usize = Count::CodeTicks as usize + 1;

/// A VP's counters; its own thread's.
#[derive(Clone, Debug)]
pub struct Counts(pub [u64; LEN]);

impl Default for Counts {
    fn default() -> Self {
        Self([0; LEN])
    }
}

impl Counts {
    /// Adds.
    #[inline(always)]
    pub fn add(&mut self, what: Count, n: u64) {
        self.0[what as usize] += n;
    }
    /// Replaces.
    pub fn set(&mut self, what: Count, n: u64) {
        self.0[what as usize] = n;
    }
}

/// What other threads see of them.
pub struct Published([AtomicU64; LEN]);

impl Default for Published {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; LEN])
    }
}

impl Published {
    /// By the VP's thread.
    pub fn store(&self, counts: &Counts) {
        for (to, from) in self.0.iter().zip(counts.0) {
            to.store(from, Ordering::Relaxed);
        }
    }
}

/// The sum over all VPs, with names; times in percent of `ticks`, the time spent executing.
pub fn report<'a>(vps: impl Iterator<Item = &'a Published>, ticks: u64) -> Vec<(&'static str, u64)> {
    let mut sum = [0u64; LEN];
    for vp in vps {
        for (to, from) in sum.iter_mut().zip(&vp.0) {
            *to += from.load(Ordering::Relaxed);
        }
    }
    // Code contains calls and what they do; translation happens in calls or in the run loop.
    let code = sum[Count::CodeTicks as usize];
    sum[Count::CodeTicks as usize] = code.saturating_sub(sum[Count::CallTicks as usize]);
    let first_time = Count::DirectTicks as usize;
    (0..LEN)
        .filter(|n| sum[*n] != 0)
        .map(|n| (NAMES[n], if n >= first_time { sum[n] * 100 / ticks.max(1) } else { sum[n] }))
        .collect()
}
