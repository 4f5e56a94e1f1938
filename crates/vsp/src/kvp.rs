//! Data exchange (key-value pairs): the host reads what the guest says of itself, and gives it pairs.

use crate::ic::{Definition, Ic, ServiceError, service, text, utf16, v};
use std::sync::Arc;
use std::time::Duration;
use vmbus::protocol::class;
use vmbus::protocol::service::{kind, status};

static DEFINITION: Definition = Definition {
    name: "kvp",
    class: class::KVP,
    instance: class::KVP_INSTANCE,
    kind: kind::KVP,
    versions: &[v(1, 0), v(3, 0), v(4, 0), v(5, 0)],
};

const KEY_BYTES: usize = 512;
const VALUE_BYTES: usize = 2048;
/// A body of any operation: the longest, an adapter's addresses, behind the header of four bytes.
const BODY_BYTES: usize = 4 + IP_BYTES;
const IP_BYTES: usize = 256 + 2 + 2048 + 2048 + 1024 + 2048;
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pairs of a pool that are read.
const MOST_PAIRS: u32 = 1024;

const OP_SET: u8 = 1;
const OP_DELETE: u8 = 2;
const OP_ENUMERATE: u8 = 3;

const TYPE_TEXT: u32 = 1;
const TYPE_U32: u32 = 4;
const TYPE_U64: u32 = 8;

/// Where pairs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// From the host to the guest.
    External = 0,
    /// From the guest's programs to the host.
    Guest = 1,
    /// What the guest's daemon says of the guest: operating system, name, addresses.
    Auto = 2,
}

/// The service.
pub struct Kvp {
    pub(crate) ic: Arc<Ic>,
}

fn request(operation: u8, pool: Pool) -> Vec<u8> {
    let mut body = vec![0; BODY_BYTES];
    body[0] = operation;
    body[1] = pool as u8;
    body
}

fn put(body: &mut [u8], at: usize, bytes: &[u8]) {
    body[at..at + bytes.len()].copy_from_slice(bytes);
}

fn too_long(what: &str) -> ServiceError {
    ServiceError::Host(format!("{what} is longer than the protocol allows (key 255, value 1023 characters)"))
}

/// Decodes `hv_kvp_exchg_msg_value`: type, key size, value size, key, value.
fn decode(data: &[u8]) -> Result<(String, String), ServiceError> {
    let malformed = ServiceError::Malformed;
    let word = |at: usize| data.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let (kind, key_len, value_len) = match (word(0), word(4), word(8)) {
        (Some(kind), Some(key), Some(value)) => (kind, key as usize, value as usize),
        _ => return Err(malformed("a pair is cut short")),
    };
    if key_len > KEY_BYTES || value_len > VALUE_BYTES {
        return Err(malformed("a key or value is longer than its field"));
    }
    let key = data.get(12..12 + key_len).ok_or(malformed("a key is cut short"))?;
    let at = 12 + KEY_BYTES;
    let value = data.get(at..at + value_len.max(8)).ok_or(malformed("a value is cut short"))?;
    let number = |len: usize| value[..len].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let value = match kind {
        TYPE_TEXT => text(&value[..value_len]),
        TYPE_U32 => number(4).to_string(),
        TYPE_U64 => number(8).to_string(),
        _ => return Err(malformed("a value's type is unknown")),
    };
    Ok((text(key), value))
}

impl Kvp {
    /// The service, not connected.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { ic: Ic::new(&DEFINITION, None) })
    }

    /// All pairs of a pool, as the guest orders them.
    pub fn pairs(&self, pool: Pool) -> Result<Vec<(String, String)>, ServiceError> {
        let mut pairs = Vec::new();
        for index in 0..MOST_PAIRS {
            let mut body = request(OP_ENUMERATE, pool);
            put(&mut body, 4, &index.to_le_bytes());
            match self.ic.call(body, TIMEOUT) {
                Ok(answer) => pairs.push(decode(answer.get(8..).unwrap_or_default())?),
                Err(ServiceError::Refused(status::NO_MORE | status::FAIL)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(pairs)
    }

    /// Gives the guest a pair (pool External).
    pub fn set(&self, key: &str, value: &str) -> Result<(), ServiceError> {
        let key = utf16(key, KEY_BYTES).ok_or_else(|| too_long("the key"))?;
        let value = utf16(value, VALUE_BYTES).ok_or_else(|| too_long("the value"))?;
        let mut body = request(OP_SET, Pool::External);
        put(&mut body, 4, &TYPE_TEXT.to_le_bytes());
        put(&mut body, 8, &(key.len() as u32).to_le_bytes());
        put(&mut body, 12, &(value.len() as u32).to_le_bytes());
        put(&mut body, 16, &key);
        put(&mut body, 16 + KEY_BYTES, &value);
        self.ic.call(body, TIMEOUT).map(|_| ())
    }

    /// Takes a pair back.
    pub fn delete(&self, key: &str) -> Result<(), ServiceError> {
        let key = utf16(key, KEY_BYTES).ok_or_else(|| too_long("the key"))?;
        let mut body = request(OP_DELETE, Pool::External);
        put(&mut body, 4, &(key.len() as u32).to_le_bytes());
        put(&mut body, 8, &key);
        self.ic.call(body, TIMEOUT).map(|_| ())
    }

    /// Is the guest's daemon there?
    pub fn is_connected(&self) -> bool {
        self.ic.version().is_some()
    }
}

service!(Kvp);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_what_guests_say_and_refuses_lies() {
        let mut data = vec![0; 12 + KEY_BYTES + VALUE_BYTES];
        let key = utf16("OSName", KEY_BYTES).unwrap();
        let value = utf16("Debian", VALUE_BYTES).unwrap();
        put(&mut data, 0, &TYPE_TEXT.to_le_bytes());
        put(&mut data, 4, &(key.len() as u32).to_le_bytes());
        put(&mut data, 8, &(value.len() as u32).to_le_bytes());
        put(&mut data, 12, &key);
        put(&mut data, 12 + KEY_BYTES, &value);
        assert_eq!(decode(&data), Ok(("OSName".into(), "Debian".into())));
        for (at, lie) in [(0usize, 99u32), (4, 513), (8, 2049), (4, u32::MAX), (8, u32::MAX)] {
            let mut lying = data.clone();
            put(&mut lying, at, &lie.to_le_bytes());
            assert!(decode(&lying).is_err(), "{at} = {lie}");
        }
        assert!(decode(&data[..100]).is_err());
        assert!(decode(&[]).is_err());
    }
}
