//! The complete state of a virtual processor, independent of the engine.
//!
//! Saved by one engine it can be loaded by another, in another process, on another host whose processor offers the
//! same model.

use serde::{Deserialize, Serialize};
use x86::regs::{cr0, dr6, dr7, rflags};
use x86::segment::{Segment, TableRegister, attr};
use x86::{msr, xsave};

/// What a VP is doing between instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// Waits in HLT (or MWAIT, or the guest-idle MSR) for an interrupt.
    Halted,
    /// An application processor after INIT: waits for a start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// An exception that was raised but not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingException {
    /// Vector, see [`x86::exception`].
    pub vector: u8,
    /// Error code, if the vector has one.
    pub error_code: Option<u32>,
}

/// Events that wait for delivery, and what holds them back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingEvents {
    /// Exception to deliver before the next instruction.
    pub exception: Option<PendingException>,
    /// External interrupt whose acknowledge cycle is done but whose delivery is not.
    pub interrupt: Option<u8>,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are held back until IRET.
    pub nmi_masked: bool,
    /// The next instruction boundary takes no interrupts (after STI or MOV SS).
    pub interrupt_shadow: bool,
    /// The shadow is that of MOV SS or POP SS: it holds back debug exceptions and NMIs too.
    pub mov_ss_shadow: bool,
    /// DR6 bits (B0-B3, BS) of a debug exception that waits for the next boundary.
    pub debug: u64,
    /// INIT waits.
    pub init: bool,
    /// A start-up IPI waits, with its vector.
    pub sipi: Option<u8>,
}

/// Local APIC registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// The register page (offsets 0 to 0x3ff; SDM volume 3, table 10-1), little-endian dwords at multiples of 16. The
    /// same layout as KVM's `kvm_lapic_state`. In x2APIC mode offset 0x20 holds the 32-bit id.
    pub regs: Vec<u8>,
    /// `IA32_APIC_BASE`.
    pub base: u64,
    /// `IA32_TSC_DEADLINE` (0: not armed).
    pub tsc_deadline: u64,
}

impl LapicState {
    /// Bytes of the register page that are kept.
    pub const SIZE: usize = 0x400;

    /// State after reset of the VP with this APIC id (SDM volume 3, section 10.4.7.1).
    pub fn reset(apic_id: u32, bsp: bool) -> Self {
        let mut regs = vec![0u8; Self::SIZE];
        let mut set = |offset: usize, value: u32| regs[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        set(0x20, apic_id << 24);
        // Version 0x14 (integrated APIC), six LVT entries (max LVT entry 5).
        set(0x30, 0x0005_0014);
        set(0xe0, 0xffff_ffff);
        set(0xf0, 0xff);
        for lvt in [0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
            set(lvt, 0x1_0000);
        }
        let bsp_bit = if bsp { msr::apic_base::BSP } else { 0 };
        Self { regs, base: msr::apic_base::DEFAULT | msr::apic_base::ENABLE | bsp_bit, tsc_deadline: 0 }
    }
}

/// Everything that makes a VP what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpState {
    /// General-purpose registers by number ([`x86::regs::gpr`]).
    pub gprs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS ([`x86::segment::sreg`]). FS and GS bases are here and not among the MSRs.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// Control registers (CR8 is the local APIC's task priority).
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base and PCID.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// `EFER`, with LMA.
    pub efer: u64,
    /// `XCR0`.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// Page-directory pointers that PAE paging has loaded (without long mode).
    pub pdptrs: [u64; 4],
    /// Other MSRs, by number, each once, ascending. Registers that are fields above or in `lapic` are not repeated,
    /// except that TSC is here: its value when the state was taken.
    pub msrs: Vec<(u32, u64)>,
    /// x87, SSE and AVX state in the standard XSAVE format ([`x86::xsave`]), `AREA_SIZE` bytes.
    pub xsave: Vec<u8>,
    /// Local APIC.
    pub lapic: LapicState,
    /// Events in flight.
    pub pending: PendingEvents,
    /// Running, halted, waiting to be started.
    pub activity: Activity,
}

impl VpState {
    /// State after power-on or reset (SDM volume 3, table 9-1), for VP `apic_id`. Application processors wait for SIPI.
    /// `cpu_signature` is CPUID.1:EAX, which the processor leaves in EDX.
    pub fn reset(apic_id: u32, cpu_signature: u32) -> Self {
        let bsp = apic_id == 0;
        let data = Segment { base: 0, limit: 0xffff, attr: attr::P | attr::S | 3, selector: 0 };
        let code = Segment { base: 0xffff_0000, limit: 0xffff, attr: attr::P | attr::S | 0xb, selector: 0xf000 };
        let system = |kind: u32| Segment { base: 0, limit: 0xffff, attr: attr::P | kind, selector: 0 };
        let mut gprs = [0; 16];
        gprs[x86::regs::gpr::RDX] = u64::from(cpu_signature);
        let mut xsave = vec![0u8; xsave::AREA_SIZE];
        // After power-on FCW is 0x40 and FTW 0x5555; INIT state of XSAVE is used instead, as every hypervisor does:
        // no guest reads the FPU before FNINIT.
        xsave[xsave::legacy::FCW..xsave::legacy::FCW + 2].copy_from_slice(&xsave::FCW_INIT.to_le_bytes());
        xsave[xsave::legacy::MXCSR..xsave::legacy::MXCSR + 4].copy_from_slice(&xsave::MXCSR_INIT.to_le_bytes());
        xsave[xsave::legacy::MXCSR_MASK..xsave::legacy::MXCSR_MASK + 4]
            .copy_from_slice(&xsave::MXCSR_MASK.to_le_bytes());
        Self {
            gprs,
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments: [data, code, data, data, data, data],
            ldtr: system(2),
            tr: system(0xb),
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::RESET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: dr6::RESET,
            dr7: dr7::RESET,
            pdptrs: [0; 4],
            msrs: vec![(msr::TSC, 0), (msr::PAT, msr::PAT_RESET)],
            xsave,
            lapic: LapicState::reset(apic_id, bsp),
            pending: PendingEvents::default(),
            activity: if bsp { Activity::Running } else { Activity::WaitForSipi },
        }
    }

    /// Value of one of [`VpState::msrs`].
    pub fn msr(&self, number: u32) -> Option<u64> {
        self.msrs.iter().find(|(n, _)| *n == number).map(|(_, v)| *v)
    }

    /// Sets one of [`VpState::msrs`].
    pub fn set_msr(&mut self, number: u32, value: u64) {
        match self.msrs.binary_search_by_key(&number, |(n, _)| *n) {
            Ok(i) => self.msrs[i].1 = value,
            Err(i) => self.msrs.insert(i, (number, value)),
        }
    }
}
