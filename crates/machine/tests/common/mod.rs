//! A scripted engine: its VPs run a closure instead of guest code.

use partition::{
    Abilities, DirtyPages, Engine, EngineError, EngineStats, Gpa, Msi, Partition, PartitionConfig, RunExit, TlbFlush,
    Vp, VpExits, VpIndex, VpSet, VpState,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// What a VP does: called again and again while it runs; `None` means "halt until kicked".
pub type Script = Arc<dyn Fn(VpIndex, &dyn VpExits, &VpState) -> Option<Result<RunExit, EngineError>> + Send + Sync>;

pub struct FakeEngine(pub Script);

#[derive(Default)]
pub struct Seen {
    pub prepared: AtomicU64,
    pub msis: AtomicU64,
    pub extint: AtomicBool,
    pub kicks: Mutex<Vec<bool>>,
    pub kicked: Condvar,
}

pub struct FakePartition {
    script: Script,
    seen: Arc<Seen>,
    vps: u32,
}

struct FakeVp {
    index: VpIndex,
    script: Script,
    seen: Arc<Seen>,
    state: VpState,
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn create(&self, config: PartitionConfig) -> Result<Arc<dyn Partition>, EngineError> {
        let seen = Arc::new(Seen::default());
        *seen.kicks.lock().unwrap() = vec![false; config.vp_count as usize];
        Ok(Arc::new(FakePartition { script: self.0.clone(), seen, vps: config.vp_count }))
    }
}

impl Partition for FakePartition {
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }
    fn take_vp(&self, index: VpIndex) -> Result<Box<dyn Vp>, EngineError> {
        assert!(index < self.vps);
        let state = VpState::reset(index, 0);
        Ok(Box::new(FakeVp { index, script: self.script.clone(), seen: self.seen.clone(), state }))
    }
    fn kick(&self, vp: VpIndex) {
        self.seen.kicks.lock().unwrap()[vp as usize] = true;
        self.seen.kicked.notify_all();
    }
    fn signal_msi(&self, _: Msi) {
        self.seen.msis.fetch_add(1, Ordering::SeqCst);
    }
    fn set_extint(&self, asserted: bool) {
        self.seen.extint.store(asserted, Ordering::SeqCst);
    }
    fn nmi(&self, _: VpIndex) {}
    fn init(&self, _: VpIndex) {}
    fn sipi(&self, _: VpIndex, _: u8) {}
    fn start_vp(&self, _: VpIndex, _: Box<VpState>) -> Result<(), EngineError> {
        Ok(())
    }
    fn set_ioapic_routes(&self, _: &[Option<Msi>]) {}
    fn flush_tlb(&self, _: Option<VpIndex>, _: VpSet, _: TlbFlush<'_>) {}
    fn set_auto_eoi(&self, _: VpIndex, _: [u64; 4]) {}
    fn register_doorbell(&self, _: Gpa, _: std::os::fd::BorrowedFd<'_>) -> Result<(), EngineError> {
        Ok(())
    }
    fn track_dirty(&self, _: bool) -> Result<(), EngineError> {
        Ok(())
    }
    fn take_dirty(&self, _: Gpa, _: u64) -> Result<DirtyPages, EngineError> {
        Ok(DirtyPages::default())
    }
    fn vp_runtime(&self, _: VpIndex) -> u64 {
        0
    }
    /// The interrupts that arrived, for the tests.
    fn stats(&self) -> EngineStats {
        let counters = vec![
            ("msis", self.seen.msis.load(Ordering::SeqCst)),
            ("prepared", self.seen.prepared.load(Ordering::SeqCst)),
            ("extint", self.seen.extint.load(Ordering::SeqCst).into()),
        ];
        EngineStats { counters, ..EngineStats::default() }
    }
}

impl Vp for FakeVp {
    fn index(&self) -> VpIndex {
        self.index
    }
    fn prepare(&mut self) {
        assert_eq!(std::thread::current().name(), Some(format!("vp{}", self.index).as_str()));
        std::thread::sleep(std::time::Duration::from_millis(20));
        self.seen.prepared.fetch_add(1, Ordering::SeqCst);
    }
    fn run(&mut self, exits: &dyn VpExits) -> Result<RunExit, EngineError> {
        loop {
            {
                let mut kicks = self.seen.kicks.lock().unwrap();
                if std::mem::take(&mut kicks[self.index as usize]) {
                    return Ok(RunExit::Kicked);
                }
            }
            if let Some(exit) = (self.script)(self.index, exits, &self.state) {
                return exit;
            }
            // Every run of the script is an instruction, as far as the tests count.
            self.state.rip += 1;
            let kicks = self.seen.kicks.lock().unwrap();
            let wait = std::time::Duration::from_millis(1);
            drop(self.seen.kicked.wait_timeout_while(kicks, wait, |k| !k[self.index as usize]).unwrap());
        }
    }
    fn state(&mut self) -> Result<VpState, EngineError> {
        Ok(self.state.clone())
    }
    fn set_state(&mut self, state: &VpState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }
}
