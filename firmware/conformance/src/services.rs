//! Small boot services, and the tables themselves (UEFI 2.10, chapters 4 and 7.5).

use crate::env::{bogus, bs, g, own, rs, table};
use crate::report::{self, check, equal, holds, s::*};
use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU32, Ordering};
use r_efi::efi::{self, Status, TableHeader};

pub unsafe fn run() {
    tables();
    sums_and_copies();
    counter_and_watchdog();
    configuration();
}

/// The table's checksum over its header's size, with the field itself as zero.
unsafe fn checksum_holds(name: &str, header: *mut TableHeader) {
    let size = (*header).header_size as usize;
    let mut copy = [0u8; 1024];
    if size > copy.len() {
        return holds(name, false);
    }
    core::ptr::copy_nonoverlapping(header.cast::<u8>(), copy.as_mut_ptr(), size);
    copy[16..20].fill(0);
    let mut crc = 0;
    let _ = (bs().calculate_crc32)(copy.as_mut_ptr().cast(), size, &mut crc);
    holds(name, crc == (*header).crc32);
}

unsafe fn tables() {
    let st = table();
    equal("SystemTable/signature", efi::SYSTEM_TABLE_SIGNATURE, (*st).hdr.signature);
    equal("BootServices/signature", efi::BOOT_SERVICES_SIGNATURE, bs().hdr.signature);
    equal("RuntimeServices/signature", efi::RUNTIME_SERVICES_SIGNATURE, rs().hdr.signature);
    holds("SystemTable/revision-is-2.x", (*st).hdr.revision >> 16 == 2);
    holds("SystemTable/reserved-is-zero", (*st).hdr.reserved == 0 && bs().hdr.reserved == 0);
    checksum_holds("SystemTable/crc32", &raw mut (*st).hdr);
    checksum_holds("BootServices/crc32", &raw mut (*(*st).boot_services).hdr);
    checksum_holds("RuntimeServices/crc32", &raw mut (*(*st).runtime_services).hdr);
    holds("SystemTable/vendor", !(*st).firmware_vendor.is_null() && *(*st).firmware_vendor != 0);
    let consoles = [(*st).console_in_handle, (*st).console_out_handle, (*st).standard_error_handle];
    holds("SystemTable/console-handles", consoles.iter().all(|h| !h.is_null()));
    holds("SystemTable/consoles", !(*st).con_in.is_null() && !(*st).con_out.is_null() && !(*st).std_err.is_null());
}

unsafe fn sums_and_copies() {
    let mut crc = 0;
    let text = *b"123456789";
    let data = text.as_ptr().cast_mut().cast::<c_void>();
    check("CalculateCrc32/good", &[OK], (bs().calculate_crc32)(data, 9, &mut crc));
    equal("CalculateCrc32/value", 0xcbf4_3926, u64::from(crc));
    check("CalculateCrc32/null-data", &[INVALID], (bs().calculate_crc32)(null_mut(), 9, &mut crc));
    check("CalculateCrc32/null-result", &[INVALID], (bs().calculate_crc32)(data, 9, null_mut()));
    check("CalculateCrc32/no-bytes", &[INVALID], (bs().calculate_crc32)(data, 0, &mut crc));

    let mut b = [0u8; 300];
    let fill = |b: &mut [u8; 300]| b.iter_mut().enumerate().for_each(|(i, x)| *x = i as u8);
    fill(&mut b);
    let p = b.as_mut_ptr();
    (bs().copy_mem)(p.add(10).cast(), p.cast(), 200);
    holds("CopyMem/overlap-upwards", (0..200).all(|i| *p.add(10 + i) == i as u8) && *p.add(210) == 210);
    fill(&mut b);
    let p = b.as_mut_ptr();
    (bs().copy_mem)(p.cast(), p.add(10).cast(), 200);
    holds("CopyMem/overlap-downwards", (0..200).all(|i| *p.add(i) == (i + 10) as u8) && *p.add(200) == 200);
    (bs().set_mem)(p.add(3).cast(), 5, 0xa5);
    holds("SetMem/exactly", (3..8).all(|i| *p.add(i) == 0xa5) && *p.add(2) != 0xa5 && *p.add(8) != 0xa5);
}

unsafe fn counter_and_watchdog() {
    let (mut a, mut b) = (0, 0);
    check("GetNextMonotonicCount/good", &[OK], (bs().get_next_monotonic_count)(&mut a));
    let _ = (bs().get_next_monotonic_count)(&mut b);
    holds("GetNextMonotonicCount/grows", b > a);
    check("GetNextMonotonicCount/null", &[INVALID], (bs().get_next_monotonic_count)(null_mut()));
    check("Stall/good", &[OK], (bs().stall)(10));

    // Codes up to 0xFFFF are the firmware's own.
    check("SetWatchdogTimer/firmware-code", &[INVALID], (bs().set_watchdog_timer)(300, 0x1234, 0, null_mut()));
    check("SetWatchdogTimer/good", &[OK], (bs().set_watchdog_timer)(300, 0x1_0000, 0, null_mut()));
    check("SetWatchdogTimer/off", &[OK], (bs().set_watchdog_timer)(0, 0x1_0000, 0, null_mut()));
}

static NOTICED: AtomicU32 = AtomicU32::new(0);
unsafe extern "efiapi" fn noticed(_: efi::Event, _: *mut c_void) {
    NOTICED.fetch_add(1, Ordering::Relaxed);
}

unsafe fn configuration() {
    let guid = own(1);
    let find = || {
        let st = table();
        let list = core::slice::from_raw_parts((*st).configuration_table, (*st).number_of_table_entries);
        list.iter().find(|t| t.vendor_guid == guid).map(|t| t.vendor_table)
    };
    let mut event = null_mut();
    let made = (bs().create_event_ex)(0x200, 8, Some(noticed), null_mut(), &guid, &mut event);
    check("InstallConfigurationTable/group-event", &[OK], made);
    check("InstallConfigurationTable/null-guid", &[INVALID], (bs().install_configuration_table)(null_mut(), bogus()));
    let absent = (bs().install_configuration_table)(g(&guid), null_mut());
    check("InstallConfigurationTable/remove-absent", &[NOT_FOUND], absent);
    check("InstallConfigurationTable/add", &[OK], (bs().install_configuration_table)(g(&guid), bogus()));
    holds("InstallConfigurationTable/added", find() == Some(bogus()));
    holds("InstallConfigurationTable/signals-group", NOTICED.load(Ordering::Relaxed) == 1);
    let other = bogus().cast::<u8>().add(8).cast();
    check("InstallConfigurationTable/replace", &[OK], (bs().install_configuration_table)(g(&guid), other));
    holds("InstallConfigurationTable/replaced", find() == Some(other));
    checksum_holds("InstallConfigurationTable/crc32", &raw mut (*table()).hdr);
    check("InstallConfigurationTable/remove", &[OK], (bs().install_configuration_table)(g(&guid), null_mut()));
    holds("InstallConfigurationTable/removed", find().is_none());
    let _ = (bs().close_event)(event);
}

/// Arms the watchdog for two seconds and waits for its bite.
pub unsafe fn bite() -> Status {
    report::text("\r\nWATCHDOG-ARMED\r\n");
    let status = (bs().set_watchdog_timer)(2, 0x1_0000, 0, null_mut());
    if status != Status::SUCCESS {
        return status;
    }
    let _ = (bs().stall)(20_000_000);
    report::text("\r\nWATCHDOG-ASLEEP\r\n");
    Status::TIMEOUT
}
