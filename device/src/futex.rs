//! Waits on a word that other processes may change: futexes without the PRIVATE flag.

use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::libc;

use crate::DeviceError;

/// Blocks while `word` holds `value`, until `deadline`. May return early: look at the word again.
pub(crate) fn wait_while(word: &AtomicU32, value: u32, deadline: Instant) -> Result<(), DeviceError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    // SAFETY: the word is a live, aligned u32 and the timeout a valid timespec on this stack; the kernel reads both
    // during the call only. The unused arguments are ignored for FUTEX_WAIT.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            &raw const timeout,
            ptr::null::<u32>(),
            0,
        )
    };
    match Errno::result(result) {
        // Woken, changed before it slept, interrupted, or too late: the caller looks at the word and the clock.
        Ok(_) | Err(Errno::EAGAIN | Errno::EINTR | Errno::ETIMEDOUT) => Ok(()),
        Err(source) => Err(DeviceError::System { call: "futex(FUTEX_WAIT)", source }),
    }
}

/// Stores `value` with release ordering and wakes all who wait on the word, in every process.
pub(crate) fn store_and_wake(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    // SAFETY: the word is a live, aligned u32; FUTEX_WAKE only uses its address. That is also all that it could
    // complain about, so its result tells nothing.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, libc::c_int::MAX) };
}
