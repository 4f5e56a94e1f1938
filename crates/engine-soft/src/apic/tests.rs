//! Tests of the local APIC without a processor around it.

use super::*;
use crate::vp::NoExits;
use partition::Msi;

struct Bench {
    clock: Arc<Clock>,
    bus: ApicBus,
}

impl Bench {
    fn new(count: u32) -> Self {
        let clock = Arc::new(Clock::new());
        let wakers: Vec<_> = (0..count).map(|_| Arc::new(Waker::new())).collect();
        let timers = Arc::new(Timers::new(clock.clone(), &wakers));
        let offered = Offered { x2apic: true, tsc_deadline: true };
        let lapics: Vec<_> = (0..count)
            .map(|n| Arc::new(Lapic::new(n, offered, clock.clone(), wakers[n as usize].clone(), timers.clone())))
            .collect();
        let bench = Self { clock, bus: ApicBus::new(lapics.into()) };
        for n in 0..count {
            bench.write(n, reg::SVR, 0x1ff);
        }
        bench
    }
    fn apic(&self, n: u32) -> &Lapic {
        self.bus.lapic(n).unwrap()
    }
    fn write(&self, n: u32, register: u32, value: u32) {
        self.apic(n).mmio_write(&self.bus, &NoExits, register << 4, &value.to_le_bytes());
    }
    fn read(&self, n: u32, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.apic(n).mmio_read(register << 4, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    /// VPs for which the vector waits; taken and ended.
    fn receivers(&self, vector: u8) -> Vec<u32> {
        (0..self.bus.lapics.len() as u32)
            .filter(|&n| {
                let there = self.apic(n).test_bit(reg::IRR, vector);
                self.apic(n).set_bit(reg::IRR, vector, false);
                there
            })
            .collect()
    }
    fn x2apic(&self, n: u32) {
        self.apic(n).set_base(self.apic(n).base() | apic_base::X2APIC_ENABLE, 40).unwrap();
    }
}

#[test]
fn logical_flat_and_cluster() {
    let b = Bench::new(4);
    for n in 0..4 {
        b.write(n, reg::LDR, 1 << (24 + n));
    }
    b.write(0, reg::ICR_HIGH, 0b1010 << 24);
    b.write(0, reg::ICR, 0x4850);
    assert_eq!(b.receivers(0x50), [1, 3]);
    // Cluster: high nibble the cluster, low nibble the member.
    for (n, ldr) in [(0, 0x01), (1, 0x02), (2, 0x11), (3, 0x12)] {
        b.write(n, reg::DFR, 0);
        b.write(n, reg::LDR, ldr << 24);
    }
    b.write(0, reg::ICR_HIGH, 0x13 << 24);
    b.write(0, reg::ICR, 0x4851);
    assert_eq!(b.receivers(0x51), [2, 3]);
    b.write(0, reg::ICR_HIGH, 0xf2 << 24);
    b.write(0, reg::ICR, 0x4852);
    assert_eq!(b.receivers(0x52), [1, 3]);
}

#[test]
fn x2apic_clusters_and_broadcast() {
    let b = Bench::new(20);
    (0..20).for_each(|n| b.x2apic(n));
    assert_eq!(b.apic(17).x2apic_read(reg::LDR).unwrap(), 0x1_0002);
    let send = |command: u64| b.apic(0).x2apic_write(&b.bus, &NoExits, reg::ICR, command).unwrap();
    send(0x0001_0005 << 32 | 0x4860);
    assert_eq!(b.receivers(0x60), [16, 18]);
    send(0xffff_ffff << 32 | 0x4061);
    assert_eq!(b.receivers(0x61).len(), 20);
    send(19 << 32 | 0x4062);
    assert_eq!(b.receivers(0x62), [19]);
}

#[test]
fn lowest_priority_goes_to_one_that_is_idle() {
    let b = Bench::new(4);
    for n in 0..4 {
        b.write(n, reg::LDR, 1 << (24 + n));
        b.write(n, reg::TPR, if n == 2 { 0x20 } else { 0x40 });
    }
    for _ in 0..5 {
        b.bus.deliver_msi(Msi { address: 0xfee0_0000 | 0xf << 12 | 4 | 8, data: 0x170 });
        assert_eq!(b.receivers(0x70), [2]);
    }
    // Among equals it goes around.
    b.write(2, reg::TPR, 0x40);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..8 {
        b.bus.deliver_msi(Msi { address: 0xfee0_0000 | 0xf << 12 | 4, data: 0x170 });
        seen.extend(b.receivers(0x70));
    }
    assert_eq!(seen.len(), 4);
}

#[test]
fn a_disabled_apic_takes_nothing_and_masks_its_lvt() {
    let b = Bench::new(2);
    b.write(1, reg::LVT_TIMER, 0x30);
    b.write(1, reg::SVR, 0xff);
    assert_eq!(b.read(1, reg::LVT_TIMER), 0x1_0030);
    b.bus.deliver_msi(Msi::fixed(1, 0x80));
    assert_eq!(b.receivers(0x80), [] as [u32; 0]);
    b.write(1, reg::LVT_TIMER, 0x31);
    assert_eq!(b.read(1, reg::LVT_TIMER), 0x1_0031, "an entry stays masked while the APIC is disabled");
}

#[test]
fn errors_show_after_a_write_to_esr() {
    let b = Bench::new(1);
    b.write(0, reg::LVT_ERROR, 0x90);
    b.write(0, reg::ICR, 0x4_4005);
    assert_eq!(b.read(0, reg::ESR), 0);
    b.write(0, reg::ESR, 0);
    assert_eq!(b.read(0, reg::ESR), error::SEND_ILLEGAL_VECTOR);
    assert_eq!(b.receivers(0x90), [0]);
    b.write(0, reg::ESR, 0);
    assert_eq!(b.read(0, reg::ESR), 0);
}

#[test]
fn priorities_nest() {
    let b = Bench::new(1);
    let apic = b.apic(0);
    apic.accept(0x35, false);
    apic.accept(0x61, false);
    assert_eq!(apic.pending_vector(), Some(0x61));
    apic.acknowledge(0x61);
    assert_eq!((b.read(0, reg::PPR), apic.pending_vector()), (0x60, None));
    apic.accept(0x68, false);
    assert_eq!(apic.pending_vector(), None, "the same class waits");
    apic.accept(0x70, false);
    assert_eq!(apic.pending_vector(), Some(0x70));
    apic.acknowledge(0x70);
    b.write(0, reg::EOI, 0);
    b.write(0, reg::EOI, 0);
    assert_eq!(apic.pending_vector(), Some(0x68));
    apic.set_auto_eoi([0, 1 << (0x68 - 64), 0, 0]);
    apic.acknowledge(0x68);
    assert_eq!(apic.pending_vector(), Some(0x35), "auto-EOI leaves nothing in service");
}

#[test]
fn base_transitions() {
    let b = Bench::new(1);
    let apic = b.apic(0);
    let base = apic.base();
    let x2 = apic_base::X2APIC_ENABLE;
    let on = apic_base::ENABLE;
    assert_eq!(apic.set_base(base | 1, 40), Err(Denied));
    assert_eq!(apic.set_base(base | 1 << 40, 40), Err(Denied));
    assert_eq!(apic.set_base(base & !on | x2, 40), Err(Denied));
    b.write(0, reg::TPR, 0x50);
    apic.set_base(base | x2, 40).unwrap();
    assert_eq!(apic.mmio_page(), None);
    assert_eq!(apic.tpr(), 0x50);
    assert_eq!(apic.set_base(base, 40), Err(Denied), "x2APIC mode is left through the disabled state only");
    apic.set_base(base & !on, 40).unwrap();
    assert_eq!(apic.set_base(base | x2, 40), Err(Denied));
    apic.set_base(base, 40).unwrap();
    assert_eq!((apic.tpr(), apic.mmio_page()), (0, Some(0xfee0_0000)));
}

#[test]
fn a_timer_goes_on_after_restore() {
    let b = Bench::new(1);
    b.write(0, reg::DIVIDE, 0xb);
    b.write(0, reg::LVT_TIMER, 0x2_0044);
    b.write(0, reg::INITIAL_COUNT, 1_000_000);
    let per_ms = b.clock.tsc_frequency_hz() / 1000;
    b.clock.set(per_ms / 4);
    let state = b.apic(0).state();
    let other = Bench::new(1);
    other.clock.set(b.clock.tsc());
    other.apic(0).load(&state);
    let left = other.read(0, reg::CURRENT_COUNT);
    assert!((740_000..=750_000).contains(&left), "{left}");
    other.clock.set(per_ms + per_ms / 10);
    other.apic(0).check_timer();
    assert_eq!(other.receivers(0x44), [0]);
    let left = other.read(0, reg::CURRENT_COUNT);
    assert!((890_000..=900_000).contains(&left), "{left}");
}

#[test]
fn init_then_sipi() {
    let b = Bench::new(2);
    let apic = b.apic(1);
    apic.signal_sipi(3);
    b.write(0, reg::ICR_HIGH, 1 << 24);
    b.write(0, reg::ICR, 0x4500);
    assert_eq!(apic.take_sipi(), None, "a start-up before INIT does not count");
    b.write(0, reg::ICR, 0x4608);
    b.write(0, reg::ICR, 0x4609);
    assert!(apic.take_event(event::INIT));
    assert_eq!((apic.take_sipi(), apic.take_sipi()), (Some(8), None));
    // INIT level de-assert does nothing.
    b.write(0, reg::ICR, 0x8500);
    assert_eq!(apic.events(), 0);
}
