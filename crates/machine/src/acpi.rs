//! ACPI tables: RSDP, XSDT, FADT, FACS, MADT, DSDT.
//!
//! Source: ACPI 6.5, chapter 5 (tables) and chapter 19 (AML, by way of the crate `acpi_tables`).

use crate::layout::{self, io};
use acpi_tables::aml::{
    AddressSpace as MemoryWindow, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use chipset::ioapic;
use chipset::pm::{SLP_TYP_S5, layout as pm};
use partition::{Gpa, GuestMemory, MemoryError};

const OEM: [u8; 6] = *b"VIRIDN";
const OEM_TABLE: [u8; 8] = *b"VIRIDIAN";
const REVISION: u32 = 1;

/// The tables, ready to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Address of the RSDP.
    pub rsdp: u64,
    /// Address, signature and bytes of each table, ascending.
    pub tables: Vec<(u64, &'static str, Vec<u8>)>,
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Makes the tables of a direct-booted machine with this many processors, with VMBus or without.
pub fn tables(processors: u32, vmbus: bool) -> Tables {
    tables_of(processors, vmbus, true)
}

/// Makes the tables of a generation 2 machine: VMBus, and none of the legacy devices.
pub fn generation2(processors: u32) -> Tables {
    tables_of(processors, true, false)
}

fn tables_of(processors: u32, vmbus: bool, legacy: bool) -> Tables {
    let mut tables: Vec<(u64, &'static str, Vec<u8>)> = Vec::new();
    // The RSDP must be the first thing where it is searched for; FACS needs 64-byte alignment, all get it.
    let rsdp_at = layout::TABLES.start;
    let mut next = rsdp_at + 64;
    let mut place = |name: &'static str, bytes: Vec<u8>| {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(64);
        tables.push((at, name, bytes));
        at
    };
    let dsdt_at = place("DSDT", dsdt(processors, vmbus, legacy));
    let facs_at = place("FACS", bytes_of(&FACS::new()));
    let fadt_at = place("FACP", fadt(dsdt_at, facs_at, legacy));
    let madt_at = place("APIC", madt(processors, legacy));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    let xsdt_at = place("XSDT", bytes_of(&xsdt));
    assert!(next <= crate::smbios::ENTRY_POINT, "64 processors need less than a tenth of the place");
    tables.insert(0, (rsdp_at, "RSDP", bytes_of(&Rsdp::new(OEM, xsdt_at))));
    Tables { rsdp: rsdp_at, tables }
}

impl Tables {
    /// Writes them to guest memory.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        self.tables.iter().try_for_each(|(at, _, bytes)| memory.write(Gpa(*at), bytes))
    }
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
}

fn fadt(dsdt: u64, facs: u64, legacy: bool) -> Vec<u8> {
    let event = io::PM + pm::PM1_EVENT;
    let control = io::PM + pm::PM1_CONTROL;
    let timer = io::PM + pm::TIMER;
    let gpe0 = io::PM + pm::GPE0;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .preferred_pm_profile(PmProfile::Desktop)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is in the fixed hardware; there is no sleep button.
        .flag(Flags::SlpButton)
        // The clock cannot wake the machine, which never sleeps.
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    // Both lie below 4 GiB, so that old and new fields can say the same.
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.sci_int = u16::from(io::SCI).into();
    fadt.pm1a_evt_blk = u32::from(event).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(timer).into();
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk = u32::from(gpe0).into();
    fadt.gpe0_blk_len = pm::GPE0_LEN as u8;
    // C2 and C3 are not there: latencies above 100 and 1000 µs say so.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = 0x32;
    // IAPC_BOOT_ARCH: legacy devices (bit 0), no VGA (bit 2); bit 1 clear, because nothing is plugged into the 8042.
    // Generation 2 has neither of these.
    fadt.iapc_boot_arch = if legacy { 0b101 } else { 0b100 }.into();
    fadt.reset_reg = port(io::PM + pm::RESET, 8, AccessSize::ByteAccess);
    fadt.reset_value = pm::RESET_VALUE;
    fadt.x_pm1a_evt_blk = port(event, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(control, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(timer, 32, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = port(gpe0, 32, AccessSize::ByteAccess);
    bytes_of(&fadt.finalize())
}

/// Multiple APIC description table (ACPI 6.5, section 5.2.12). By hand: the crate's cannot say that there are 8259s.
fn madt(processors: u32, legacy: bool) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, REVISION);
    table.append((layout::LOCAL_APIC as u32).to_le_bytes());
    table.append(if legacy { PCAT_COMPAT } else { 0 }.to_le_bytes());
    for id in 0..processors {
        if id < 255 {
            // Processor local APIC.
            table.append_slice(&[0, 8, id as u8, id as u8]);
            table.append(ENABLED.to_le_bytes());
        } else {
            // Processor local x2APIC.
            table.append_slice(&[9, 16, 0, 0]);
            table.append(id.to_le_bytes());
            table.append(ENABLED.to_le_bytes());
            table.append(id.to_le_bytes());
        }
    }
    // I/O APIC with id 0, interrupts from 0.
    table.append_slice(&[1, 12, 0, 0]);
    table.append((ioapic::DEFAULT_BASE as u32).to_le_bytes());
    table.append(0u32.to_le_bytes());
    // Interrupt source overrides: bus ISA, source, global interrupt, flags (polarity, trigger).
    let mut source_override = |irq: u8, pin: u32, flags: u16| {
        table.append_slice(&[2, 10, 0, irq]);
        table.append(pin.to_le_bytes());
        table.append(flags.to_le_bytes());
    };
    if legacy {
        source_override(0, io::PIT_PIN.into(), 0);
    }
    // The SCI is active high and level-triggered.
    source_override(io::SCI, io::SCI.into(), 0b1101);
    // Local APIC NMI: all processors, LINT1, as the bus says.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    bytes_of(&table)
}

fn dsdt(processors: u32, vmbus: bool, legacy: bool) -> Vec<u8> {
    let mut body = Vec::new();
    let mut scope = |device: &dyn Aml| body.extend(bytes_of(&Scope::new("\\_SB_".into(), vec![device])));
    for id in 0..processors {
        let name = format!("CP{id:02X}");
        scope(&Device::new(
            name.as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
        ));
    }
    for (name, unit, (base, irq)) in [("COM1", 1u8, io::COM1), ("COM2", 2, io::COM2)] {
        scope(&Device::new(
            name.into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &unit),
                &resources(&[(base, 8)], Some(irq)),
            ],
        ));
    }
    const LEGACY: &[&str] = &["TIMR", "PIC_", "SPKR"];
    // What else of the board must not be given to other devices.
    let board: &[(u16, u8)] =
        if legacy { &[(0x92, 1), (io::PM, pm::SIZE as u8)] } else { &[(0x28, 8), (io::PM, pm::SIZE as u8)] };
    let all = [
        ("RTC_", "PNP0B00", &[(0x70u16, 4u8)][..], Some(8)),
        ("TIMR", "PNP0100", &[(0x40, 4)], Some(0)),
        ("PIC_", "PNP0000", &[(0x20, 2), (0xa0, 2), (0x4d0, 2)], None),
        ("SPKR", "PNP0800", &[(0x61, 1)], None),
        ("MBRD", "PNP0C02", board, None),
    ];
    for (name, hid, ports, irq) in all.into_iter().filter(|d| legacy || !LEGACY.contains(&d.0)) {
        scope(&Device::new(name.into(), vec![&Name::new("_HID".into(), &EISAName::new(hid)), &resources(ports, irq)]));
    }
    if vmbus {
        // Guests find VMBus by this device; its window is the MMIO space that synthetic devices may use. (Hyper-V spells
        // the id "VMBus"; guests do not mind the case, iasl does.)
        let window = MemoryWindow::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            layout::VMBUS_MMIO.start as u32,
            (layout::VMBUS_MMIO.end - 1) as u32,
            None,
        );
        scope(&Device::new(
            "VMBS".into(),
            vec![
                &Name::new("_HID".into(), &"VMBUS"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_DDN".into(), &"VMBUS"),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window])),
            ],
        ));
    }
    body.extend(bytes_of(&Name::new("_S5_".into(), &Package::new(vec![&SLP_TYP_S5, &SLP_TYP_S5, &ZERO, &ZERO]))));
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    table.append_slice(&body);
    bytes_of(&table)
}

/// `_CRS` of fixed ports (first, count) and an ISA interrupt.
fn resources(ports: &[(u16, u8)], irq: Option<u8>) -> Name {
    let ports: Vec<IO> = ports.iter().map(|(base, len)| IO::new(*base, *base, 1, *len)).collect();
    // Consumer, edge-triggered, active high, exclusive.
    let interrupt = irq.map(|irq| Interrupt::new(true, true, false, false, u32::from(irq)));
    let mut all: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
    all.extend(interrupt.iter().map(|i| i as &dyn Aml));
    Name::new("_CRS".into(), &ResourceTemplate::new(all))
}

/// Paths are four characters a segment; the crate panics on others, which a test finds.
const _: fn(&str) -> aml::Path = aml::Path::new;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_addresses() {
        for processors in [1, 4, 64] {
            let tables = tables(processors, processors > 1);
            assert!(tables.tables.windows(2).all(|w| w[0].0 + w[0].2.len() as u64 <= w[1].0));
            for (_, name, bytes) in &tables.tables {
                if *name == "FACS" {
                    continue;
                }
                assert_eq!(bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0, "{name}");
                if *name != "RSDP" {
                    assert_eq!(&bytes[..4], name.as_bytes());
                    assert_eq!(u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize, bytes.len());
                }
            }
        }
    }
}
