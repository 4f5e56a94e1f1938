//! Classes (interface types) of synthetic devices, and the instances that are the same on every machine.
#![allow(missing_docs)]

use crate::Guid;

pub const SCSI: Guid = Guid::new(0xba6163d9, 0x04a1, 0x4d29, 0xb605_72e2ffb1dc7f);
pub const IDE: Guid = Guid::new(0x32412632, 0x86cb, 0x44a2, 0x9b5c_50d1417354f5);
pub const NETWORK: Guid = Guid::new(0xf8615163, 0xdf3e, 0x46c5, 0x913f_f2d2f965ed0e);
pub const KEYBOARD: Guid = Guid::new(0xf912ad6d, 0x2b17, 0x48ea, 0xbd65_f927a61c7684);
pub const KEYBOARD_INSTANCE: Guid = Guid::new(0xd34b2567, 0xb9b6, 0x42b9, 0x8778_0a4ec0b955bf);
pub const MOUSE: Guid = Guid::new(0xcfa8b69e, 0x5b4a, 0x4cc0, 0xb98b_8ba1a1f3f95a);
pub const MOUSE_INSTANCE: Guid = Guid::new(0x58f75a6d, 0xd949, 0x4320, 0x99e1_a2a2576d581c);
pub const VIDEO: Guid = Guid::new(0xda0a7802, 0xe377, 0x4aac, 0x8e77_0558eb1073f8);
pub const VIDEO_INSTANCE: Guid = Guid::new(0x5620e0c7, 0x8062, 0x4dce, 0xaeb7_520c7ef76171);
pub const SHUTDOWN: Guid = Guid::new(0x0e0b6031, 0x5213, 0x4934, 0x818b_38d90ced39db);
pub const SHUTDOWN_INSTANCE: Guid = Guid::new(0xb6650ff7, 0x33bc, 0x4840, 0x8048_e0676786f393);
pub const TIME_SYNC: Guid = Guid::new(0x9527e630, 0xd0ae, 0x497b, 0xadce_e80ab0175caf);
pub const TIME_SYNC_INSTANCE: Guid = Guid::new(0x2dd1ce17, 0x079e, 0x403c, 0xb352_a1921ee207ee);
pub const KVP: Guid = Guid::new(0xa9a0f4e7, 0x5a45, 0x4d96, 0xb827_8a841e8c03e6);
pub const KVP_INSTANCE: Guid = Guid::new(0x242ff919, 0x07db, 0x4180, 0x9c2e_b86cb68c8c55);
pub const HEARTBEAT: Guid = Guid::new(0x57164f39, 0x9115, 0x4e78, 0xab55_382f3bd5422d);
pub const HEARTBEAT_INSTANCE: Guid = Guid::new(0xfd149e91, 0x82e0, 0x4a7d, 0xafa6_2a4166cbd7c0);
pub const VSS: Guid = Guid::new(0x35fa2e29, 0xea23, 0x4236, 0x96ae_3a6ebacba440);
pub const VSS_INSTANCE: Guid = Guid::new(0x5ced1297, 0x4598, 0x4915, 0xa5fc_ad21bb4d02a4);
pub const FILE_COPY: Guid = Guid::new(0x34d14be3, 0xdee4, 0x41c8, 0x9ae7_6b174977c192);
pub const FILE_COPY_INSTANCE: Guid = Guid::new(0xeb765408, 0x105f, 0x49b6, 0xb4aa_c123b64d17d4);
