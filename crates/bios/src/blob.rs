//! The configuration blob: typed records that tell the firmware what machine it is in (mu_msvm `BiosInterface.h`,
//! `UEFI_CONFIG_*`).
//!
//! The first record holds the number of records and bytes. Every record starts with its type and length and is padded to
//! 8 bytes.

/// Record types that Viridian writes or reads.
pub mod kind {
    #![allow(missing_docs)]
    pub const STRUCTURE_COUNT: u32 = 0x00;
    pub const BIOS_INFORMATION: u32 = 0x01;
    pub const SRAT: u32 = 0x02;
    pub const MEMORY_MAP: u32 = 0x03;
    pub const ENTROPY: u32 = 0x04;
    pub const BIOS_GUID: u32 = 0x05;
    pub const SMBIOS_SYSTEM_SERIAL: u32 = 0x06;
    pub const SMBIOS_BASE_SERIAL: u32 = 0x07;
    pub const SMBIOS_CHASSIS_SERIAL: u32 = 0x08;
    pub const SMBIOS_CHASSIS_ASSET: u32 = 0x09;
    pub const SMBIOS_LOCK_STRING: u32 = 0x0a;
    pub const SMBIOS_PROCESSOR: u32 = 0x0b;
    pub const SMBIOS_SOCKET: u32 = 0x0c;
    pub const SMBIOS_PROCESSOR_MANUFACTURER: u32 = 0x0d;
    pub const SMBIOS_PROCESSOR_VERSION: u32 = 0x0e;
    pub const FLAGS: u32 = 0x12;
    pub const PROCESSOR_INFORMATION: u32 = 0x13;
    pub const MMIO_RANGES: u32 = 0x14;
    pub const ACPI_TABLE: u32 = 0x16;
    pub const MADT: u32 = 0x18;
    pub const SMBIOS_SYSTEM_MANUFACTURER: u32 = 0x1a;
    pub const SMBIOS_SYSTEM_PRODUCT: u32 = 0x1b;
    pub const SMBIOS_SYSTEM_VERSION: u32 = 0x1c;
    /// Viridian's own: the linear frame buffer (address u64, width, height, bytes a line, reserved: u32 each). Types from
    /// 0x5600_0000 on are not Microsoft's; a firmware passes over what it does not know.
    pub const VIRIDIAN_FRAME_BUFFER: u32 = 0x5600_0000;
    /// Viridian's own: text of one line for the firmware's screen (VM name).
    pub const VIRIDIAN_NAME: u32 = 0x5600_0001;
    /// Viridian's own: the SMBIOS structure table, its length (u64) first.
    pub const VIRIDIAN_SMBIOS: u32 = 0x5600_0002;
    /// Viridian's own: what to try before the boot options, `disk`, `dvd` or a file's path.
    pub const VIRIDIAN_BOOT_FIRST: u32 = 0x5600_0003;
}

/// Bits of the FLAGS record.
pub mod flags {
    #![allow(missing_docs)]
    pub const SERIAL_CONTROLLERS_ENABLED: u64 = 1 << 0;
    pub const PAUSE_AFTER_BOOT_FAILURE: u64 = 1 << 1;
    pub const PXE_IP_V6: u64 = 1 << 2;
    pub const DEBUGGER_ENABLED: u64 = 1 << 3;
    pub const TPM_ENABLED: u64 = 1 << 5;
    pub const HIBERNATE_ENABLED: u64 = 1 << 6;
    /// Two bits: 0 screen and keyboard, 1 COM1, 2 COM2, 3 none.
    pub const CONSOLE_MODE_SHIFT: u32 = 7;
    pub const MEMORY_ATTRIBUTES_TABLE: u64 = 1 << 9;
    pub const DISABLE_FRONT_PAGE: u64 = 1 << 14;
    pub const DEFAULT_BOOT_ALWAYS_ATTEMPT: u64 = 1 << 15;
    pub const WATCHDOG_ENABLED: u64 = 1 << 24;
}

/// Flags of a memory range.
pub const RANGE_RESERVED: u32 = 1;

/// Builds a blob.
#[derive(Default)]
pub struct BlobBuilder {
    records: Vec<u8>,
    count: u32,
}

impl BlobBuilder {
    /// An empty blob.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a record.
    #[must_use]
    pub fn record(mut self, kind: u32, data: &[u8]) -> Self {
        let len = (8 + data.len()).next_multiple_of(8);
        self.records.extend(kind.to_le_bytes());
        self.records.extend((len as u32).to_le_bytes());
        self.records.extend_from_slice(data);
        self.records.resize(self.records.len().next_multiple_of(8), 0);
        self.count += 1;
        self
    }

    /// Adds a record with a string and its terminator.
    #[must_use]
    pub fn text(self, kind: u32, text: &str) -> Self {
        let clean: Vec<u8> = text.bytes().filter(|b| *b != 0).chain([0]).collect();
        self.record(kind, &clean)
    }

    /// Adds the memory map: ranges of (address, bytes, flags), as of VDev version 5.
    #[must_use]
    pub fn memory_map(self, ranges: &[(u64, u64, u32)]) -> Self {
        let mut d = Vec::with_capacity(ranges.len() * 24);
        for (address, bytes, flags) in ranges {
            d.extend(address.to_le_bytes());
            d.extend(bytes.to_le_bytes());
            d.extend(flags.to_le_bytes());
            d.extend([0; 4]);
        }
        self.record(kind::MEMORY_MAP, &d)
    }

    /// Adds the MMIO ranges: (address, bytes), multiples of 4 KiB.
    #[must_use]
    pub fn mmio_ranges(self, ranges: &[(u64, u64)]) -> Self {
        let d: Vec<u8> =
            ranges.iter().flat_map(|(a, b)| [(a >> 12).to_le_bytes(), (b >> 12).to_le_bytes()].concat()).collect();
        self.record(kind::MMIO_RANGES, &d)
    }

    /// Adds the processor counts.
    #[must_use]
    pub fn processors(self, count: u32) -> Self {
        let d: Vec<u8> = [count, count, count, 1].iter().flat_map(|v| v.to_le_bytes()).collect();
        self.record(kind::PROCESSOR_INFORMATION, &d)
    }

    /// Adds what tells the machine from others: entropy, a GUID and texts of it, the same for all starts in this process.
    #[must_use]
    pub fn identity(self) -> Self {
        static ID: std::sync::OnceLock<[u8; 16]> = std::sync::OnceLock::new();
        // Without random numbers of the host the machine still starts; it is only not told from others.
        let random = |bytes: &mut [u8]| {
            let _ = getrandom::fill(bytes);
        };
        let id = ID.get_or_init(|| {
            let mut id = [0; 16];
            random(&mut id);
            // Version 4 of RFC 9562, in the byte order of EFI.
            id[7] = id[7] & 0x0f | 0x40;
            id[8] = id[8] & 0x3f | 0x80;
            id
        });
        let mut entropy = [0; 64];
        random(&mut entropy);
        let text = uefi_core::guid::Guid(*id).to_string();
        self.record(kind::ENTROPY, &entropy)
            .record(kind::BIOS_GUID, id)
            .text(kind::SMBIOS_SYSTEM_MANUFACTURER, "Viridian")
            .text(kind::SMBIOS_SYSTEM_PRODUCT, "Virtual Machine")
            .text(kind::SMBIOS_SYSTEM_SERIAL, &text)
            .text(kind::SMBIOS_BASE_SERIAL, &text)
            .text(kind::SMBIOS_CHASSIS_SERIAL, &text)
    }

    /// The blob, with its first record.
    pub fn build(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + self.records.len());
        out.extend(kind::STRUCTURE_COUNT.to_le_bytes());
        out.extend(16u32.to_le_bytes());
        out.extend((self.count + 1).to_le_bytes());
        out.extend((16 + self.records.len() as u32).to_le_bytes());
        out.extend(self.records);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uefi_core::bytes::u32_at;

    #[test]
    fn records_are_aligned_and_counted() {
        let blob = BlobBuilder::new()
            .text(kind::SMBIOS_SYSTEM_SERIAL, "abc")
            .processors(4)
            .memory_map(&[(0, 1 << 30, 0)])
            .build();
        let (mut at, mut seen) = (0, Vec::new());
        while at < blob.len() {
            seen.push(u32_at(&blob, at).unwrap());
            let len = u32_at(&blob, at + 4).unwrap() as usize;
            assert!(len >= 8 && len % 8 == 0);
            at += len;
        }
        assert_eq!(seen, [0, 6, 0x13, 3]);
        assert_eq!((u32_at(&blob, 8), u32_at(&blob, 12)), (Some(4), Some(blob.len() as u32)));
    }
}
