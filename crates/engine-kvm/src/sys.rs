//! Calls to KVM that `kvm-ioctls` does not offer, and the signal that ends `KVM_RUN`.

use kvm_bindings::{kvm_device_attr, kvm_interrupt, kvm_ioeventfd};
use partition::EngineError;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

const KVMIO: u64 = 0xae;

/// _IOW(KVMIO, number, size): direction 1 in bits 30-31, size in bits 16-29.
const fn iow(number: u64, size: usize) -> u64 {
    1 << 30 | (size as u64) << 16 | KVMIO << 8 | number
}

const KVM_INTERRUPT: u64 = iow(0x86, size_of::<kvm_interrupt>());
const KVM_IOEVENTFD: u64 = iow(0x79, size_of::<kvm_ioeventfd>());
const KVM_SET_DEVICE_ATTR: u64 = iow(0xe1, size_of::<kvm_device_attr>());
const KVM_GET_DEVICE_ATTR: u64 = iow(0xe2, size_of::<kvm_device_attr>());

/// # Safety
/// `request` must take a pointer to a `T` that KVM reads, and writes nowhere but where the `T` says.
unsafe fn ioctl<T>(fd: RawFd, request: u64, argument: &T) -> io::Result<()> {
    // SAFETY: the caller's promise.
    if unsafe { libc::ioctl(fd, request as _, std::ptr::from_ref(argument)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `KVM_INTERRUPT`: the vector that the PIC gave.
pub fn interrupt(vcpu: &impl AsRawFd, vector: u8) -> io::Result<()> {
    // SAFETY: the request reads a `kvm_interrupt`.
    unsafe { ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &kvm_interrupt { irq: vector.into() }) }
}

/// `KVM_IOEVENTFD`: writes of exactly 4 bytes, of any value, to a guest physical address.
pub fn doorbell(vm: &impl AsRawFd, gpa: u64, event: RawFd) -> io::Result<()> {
    let argument = kvm_ioeventfd { addr: gpa, len: 4, fd: event, ..Default::default() };
    // SAFETY: the request reads a `kvm_ioeventfd`; KVM takes its own reference to the event.
    unsafe { ioctl(vm.as_raw_fd(), KVM_IOEVENTFD, &argument) }
}

/// Reads a 64-bit attribute of a vCPU.
pub fn get_vcpu_attribute(vcpu: &impl AsRawFd, group: u32, attribute: u64) -> io::Result<u64> {
    let mut value = 0u64;
    let argument =
        kvm_device_attr { flags: 0, group, attr: attribute, addr: std::ptr::from_mut(&mut value).addr() as u64 };
    // SAFETY: KVM writes 8 bytes to `value`, which outlives the call.
    unsafe { ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &argument)? };
    Ok(value)
}

/// Writes a 64-bit attribute of a vCPU.
pub fn set_vcpu_attribute(vcpu: &impl AsRawFd, group: u32, attribute: u64, value: u64) -> io::Result<()> {
    let argument = kvm_device_attr { flags: 0, group, attr: attribute, addr: std::ptr::from_ref(&value).addr() as u64 };
    // SAFETY: KVM reads 8 bytes from `value`, which outlives the call.
    unsafe { ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &argument) }
}

/// Turns what `kvm-ioctls` reports into the contract's error.
pub fn host(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> EngineError {
    move |e| EngineError::Host { call, source: io::Error::from_raw_os_error(e.errno()) }
}

/// The signal that ends a `KVM_RUN` of another thread.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler of the kick signal (it does nothing: the signal's arrival is the message), once a process.
pub fn install_kick_handler() -> io::Result<()> {
    static DONE: std::sync::OnceLock<Result<(), i32>> = std::sync::OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: a zeroed `sigaction` is valid; the handler does nothing. No SA_RESTART: KVM_RUN must end.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
        };
        if result < 0 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)) } else { Ok(()) }
    });
    done.map_err(io::Error::from_raw_os_error)
}

/// Lets the kick signal reach the calling thread.
pub fn unblock_kick_signal() {
    // SAFETY: changes the calling thread's signal mask only; the set is initialised before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}
