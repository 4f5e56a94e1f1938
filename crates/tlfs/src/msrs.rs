//! Synthetic MSRs (TLFS appendix F).

use crate::defs::{HYPERCALL_LOCKED, PAGE_ADDRESS, PAGE_ENABLE, crash, msr};
use crate::hv::{CrashReport, HvPartition, TimerId};
use partition::{Access, Gpa, MsrOutcome, VpIndex};

/// SVERSION (TLFS section 11.8.2).
const SYNIC_VERSION: u64 = 1;
/// Crash reports that are passed on in one boot.
const MOST_CRASH_REPORTS: u32 = 16;
/// Bytes of the guest's text that are read.
const MOST_CRASH_TEXT: u64 = 4096;
/// x2APIC register numbers.
const APIC_TPR: u32 = 0x08;
const APIC_EOI: u32 = 0x0b;
const APIC_ICR: u32 = 0x30;

impl HvPartition {
    /// RDMSR of a register in 0x4000_0000 to 0x4000_1FFF.
    pub fn msr_read(&self, vp: VpIndex, number: u32) -> MsrOutcome {
        use MsrOutcome::{Fault, Value, ValueThenIdle};
        let synic = |f: &dyn Fn(&crate::synic::VpSynic) -> u64| self.vp_state(vp).map_or(Fault, |s| Value(f(&s)));
        match number {
            msr::GUEST_OS_ID => Value(self.global().guest_os_id),
            msr::HYPERCALL => Value(self.global().hypercall),
            msr::VP_INDEX => Value(u64::from(vp)),
            msr::RESET => Value(0),
            msr::VP_RUNTIME => Value(self.partition().map_or(0, |p| p.vp_runtime(vp))),
            msr::TIME_REF_COUNT => Value(self.time.now()),
            msr::REFERENCE_TSC => Value(self.global().reference_tsc),
            msr::TSC_FREQUENCY => Value(self.time.frequency_hz()),
            msr::APIC_FREQUENCY => Value(self.config.apic_frequency_hz),
            msr::ICR | msr::TPR if self.config.abilities.apic_access => {
                let Some(partition) = self.partition() else { return Fault };
                match number {
                    // The MSR has the xAPIC format: destination in bits 56 to 63.
                    msr::ICR => {
                        let icr = partition.apic_read(vp, APIC_ICR);
                        Value(icr & 0xffff_ffff | (icr >> 32 & 0xff) << 56)
                    }
                    _ => Value(partition.apic_read(vp, APIC_TPR) & 0xff),
                }
            }
            // EOI is write-only in TLFS; Linux reads it through the same accessor as the APIC's register: zero.
            msr::EOI if self.config.abilities.apic_access => Value(0),
            msr::VP_ASSIST_PAGE => synic(&|s| s.vp_assist),
            msr::SCONTROL => synic(&|s| s.scontrol),
            msr::SVERSION => Value(SYNIC_VERSION),
            msr::SIEFP => synic(&|s| s.siefp),
            msr::SIMP => synic(&|s| s.simp),
            msr::EOM => Value(0),
            msr::SINT0..=msr::SINT15 => synic(&|s| s.sints[(number - msr::SINT0) as usize]),
            msr::STIMER0_CONFIG..=msr::STIMER3_COUNT => synic(&|s| {
                let timer = &s.timers[((number - msr::STIMER0_CONFIG) / 2) as usize];
                if (number - msr::STIMER0_CONFIG) % 2 == 0 { timer.config } else { timer.count }
            }),
            msr::GUEST_IDLE => ValueThenIdle(0),
            msr::CRASH_P0..=msr::CRASH_P4 => Value(self.global().crash[(number - msr::CRASH_P0) as usize]),
            // What can be asked for.
            msr::CRASH_CTL => Value(crash::NOTIFY | crash::MESSAGE),
            _ => Fault,
        }
    }

    /// WRMSR of a register in 0x4000_0000 to 0x4000_1FFF.
    pub fn msr_write(&self, vp: VpIndex, number: u32, value: u64) -> MsrOutcome {
        let ok = match number {
            msr::GUEST_OS_ID => {
                self.write_guest_os_id(value);
                true
            }
            msr::HYPERCALL => self.write_hypercall(value),
            msr::RESET => {
                if value & 1 != 0 {
                    self.config.host.reset(vp);
                }
                true
            }
            msr::REFERENCE_TSC => self.write_reference_tsc(value),
            msr::EOI | msr::ICR | msr::TPR if self.config.abilities.apic_access => self.write_apic(vp, number, value),
            msr::VP_ASSIST_PAGE => self.write_page(vp, value, |s| &mut s.vp_assist),
            msr::SCONTROL => self.write_synic(vp, |s| s.scontrol = value & 1),
            msr::SIEFP => self.write_page(vp, value, |s| &mut s.siefp),
            msr::SIMP => self.write_page(vp, value, |s| &mut s.simp),
            msr::EOM => self
                .with_synic(vp, |s, actions| {
                    s.end_of_message(self, actions);
                    s.resume_timers(self, vp, actions);
                })
                .is_some(),
            msr::SINT0..=msr::SINT15 => self
                .with_synic(vp, |s, actions| {
                    let ok = s.write_sint(self, (number - msr::SINT0) as usize, value, actions);
                    s.resume_timers(self, vp, actions);
                    ok
                })
                .unwrap_or(false),
            msr::STIMER0_CONFIG..=msr::STIMER3_COUNT => {
                let id = TimerId { vp, timer: ((number - msr::STIMER0_CONFIG) / 2) as u8 };
                let count = (number - msr::STIMER0_CONFIG) % 2 == 1;
                self.with_synic(vp, |s, actions| match count {
                    true => {
                        s.write_timer_count(self, id, value, actions);
                        true
                    }
                    false => s.write_timer_config(self, id, value, actions),
                })
                .unwrap_or(false)
            }
            msr::CRASH_P0..=msr::CRASH_P4 => {
                self.global().crash[(number - msr::CRASH_P0) as usize] = value;
                true
            }
            msr::CRASH_CTL => {
                if value & crash::NOTIFY != 0 {
                    self.report_crash(vp, value & crash::MESSAGE != 0);
                }
                true
            }
            _ => false,
        };
        if ok { MsrOutcome::Value(0) } else { MsrOutcome::Fault }
    }

    fn is_ram(&self, gpa: u64) -> bool {
        self.config.memory.is_mapped(Gpa(gpa), 0x1000, Access::Ram)
    }

    /// Clearing the guest's identity disables the hypercall page (TLFS section 3.13).
    fn write_guest_os_id(&self, value: u64) {
        let mut global = self.global();
        if value != global.guest_os_id {
            tracing::info!(guest_os_id = format_args!("{value:#x}"), "the guest has identified itself");
        }
        global.guest_os_id = value;
        if value == 0 {
            global.hypercall &= !PAGE_ENABLE;
        }
    }

    fn write_hypercall(&self, value: u64) -> bool {
        let mut global = self.global();
        if global.hypercall & HYPERCALL_LOCKED != 0 {
            return true;
        }
        // Without an identity the page cannot be enabled; the rest of the value is kept.
        let value = if global.guest_os_id == 0 { value & !PAGE_ENABLE } else { value };
        if value & PAGE_ENABLE != 0 {
            let gpa = value & PAGE_ADDRESS;
            if !self.is_ram(gpa) {
                return false;
            }
            // OUT imm8, AL; RET. The OUT is the exit; it clobbers nothing and is the same in 32- and 64-bit mode. The
            // rest is INT3.
            let mut page = [0xcc; 0x1000];
            page[..3].copy_from_slice(&[0xe6, self.config.hypercall_port, 0xc3]);
            if self.config.memory.write(Gpa(gpa), &page).is_err() {
                return false;
            }
        }
        global.hypercall = value;
        true
    }

    fn write_reference_tsc(&self, value: u64) -> bool {
        let mut global = self.global();
        if value & PAGE_ENABLE != 0 && !self.is_ram(value & PAGE_ADDRESS) {
            return false;
        }
        global.reference_tsc = value;
        self.write_tsc_page(value);
        true
    }

    /// Writes the reference TSC page, if it is enabled.
    pub(crate) fn write_tsc_page(&self, register: u64) {
        if register & PAGE_ENABLE != 0 {
            let (gpa, page) = (Gpa(register & PAGE_ADDRESS), self.time.page());
            // The sequence is written last: a guest that reads it before and after sees a change.
            let _ = self.config.memory.write(gpa + 4, &page[4..]);
            let _ = self.config.memory.write(gpa, &page[..4]);
        }
    }

    fn write_synic(&self, vp: VpIndex, f: impl FnOnce(&mut crate::synic::VpSynic)) -> bool {
        self.with_synic(vp, |synic, actions| {
            f(synic);
            synic.changed(self, actions);
            synic.resume_timers(self, vp, actions);
        })
        .is_some()
    }

    /// Writes a register that enables a page of the VP; the page reads as zero when it is enabled or moved.
    fn write_page(&self, vp: VpIndex, value: u64, field: impl Fn(&mut crate::synic::VpSynic) -> &mut u64) -> bool {
        let gpa = value & PAGE_ADDRESS;
        if value & PAGE_ENABLE != 0 && !self.is_ram(gpa) {
            return false;
        }
        self.write_synic(vp, |synic| {
            let register = field(synic);
            let fresh = *register & PAGE_ENABLE == 0 || *register & PAGE_ADDRESS != gpa;
            *register = value;
            if value & PAGE_ENABLE != 0 && fresh {
                // Checked above; a page that another VP unmaps meanwhile is that guest's loss.
                let _ = self.config.memory.fill(Gpa(gpa), 0, 0x1000);
            }
        })
    }

    fn write_apic(&self, vp: VpIndex, number: u32, value: u64) -> bool {
        let Some(partition) = self.partition() else { return false };
        match number {
            msr::EOI => partition.apic_write(vp, APIC_EOI, 0),
            msr::TPR if value > 0xff => return false,
            msr::TPR => partition.apic_write(vp, APIC_TPR, value),
            _ => {
                // Destination: 0xff is "all" in the xAPIC's format, all ones in the x2APIC's.
                let destination = match value >> 56 {
                    0xff => 0xffff_ffff,
                    id => id,
                };
                partition.apic_write(vp, APIC_ICR, value & 0xffff_ffff | destination << 32);
            }
        }
        true
    }

    fn report_crash(&self, vp: VpIndex, with_message: bool) {
        let parameters = {
            let mut global = self.global();
            global.crashes = global.crashes.saturating_add(1);
            if global.crashes > MOST_CRASH_REPORTS {
                return;
            }
            global.crash
        };
        let message = with_message.then(|| self.crash_text(parameters[3], parameters[4])).flatten();
        self.config.host.crashed(CrashReport { vp, parameters, message });
    }

    fn crash_text(&self, gpa: u64, len: u64) -> Option<String> {
        let mut bytes = vec![0; len.min(MOST_CRASH_TEXT) as usize];
        self.config.memory.read(Gpa(gpa), &mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches('\0');
        Some(text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect())
    }
}
