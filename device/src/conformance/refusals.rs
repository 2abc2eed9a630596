use std::sync::Arc;

use super::{Fixture, done, pattern, refused, slice, soon, whole};
use crate::{
    DeviceError, DeviceId, DeviceSlice, HostSlice, LinkThrottle, MemoryHandle, doorbell, open_device,
};

/// A slice is inside its memory or is not made.
pub fn ranges_outside_are_refused(fixture: &Fixture) {
    let memory = fixture.allocate(1_000);
    let host = fixture.pinned(&[0; 1_000]);
    for (offset, bytes) in
        [(0, 1_001), (1_000, 1), (1_001, 0), (999, 2), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)]
    {
        let out_of_range = |error: DeviceError| match error {
            DeviceError::OutOfRange { offset: at, bytes: long, capacity_bytes, .. } => {
                assert_eq!((at, long, capacity_bytes), (offset, bytes, 1_000));
            }
            other => panic!("{other:?}"),
        };
        out_of_range(refused(DeviceSlice::new(Arc::clone(&memory), offset, bytes)));
        out_of_range(refused(whole(&memory).sub(offset, bytes)));
        out_of_range(refused(HostSlice::new(host.memory().clone(), offset, bytes)));
        out_of_range(refused(host.sub(offset, bytes)));
    }
    // A part counts from where its whole begins, and ends there, too.
    let part = slice(&memory, 100, 200);
    assert_eq!(done(part.sub(50, 150)).address().0, memory.address().0 + 150);
    refused(part.sub(50, 151));
}

/// A copy's two ends are equally long, and apart if both are the device's.
pub fn unequal_copies_are_refused(fixture: &Fixture) {
    let memory = fixture.allocate(1_000);
    let host = fixture.pinned(&[0; 1_000]);
    let mut stream = fixture.stream();
    let short = slice(&memory, 0, 999);
    let unequal = |from_bytes, to_bytes| DeviceError::UnequalCopy { from_bytes, to_bytes };
    assert_eq!(refused(stream.copy_in(&host, &short)), unequal(1_000, 999));
    assert_eq!(refused(stream.copy_out(&short, &host)), unequal(999, 1_000));
    assert_eq!(refused(stream.copy_within(&slice(&memory, 0, 10), &slice(&memory, 20, 11))), unequal(10, 11));
    let overlapping = DeviceError::OverlappingCopy { from_offset: 100, to_offset: 109, bytes: 10 };
    assert_eq!(refused(stream.copy_within(&slice(&memory, 100, 10), &slice(&memory, 109, 10))), overlapping);
    done(stream.copy_within(&slice(&memory, 100, 10), &slice(&memory, 90, 10)));
    // A refusal leaves the stream usable.
    done(stream.copy_in(&host, &whole(&memory)));
    done(done(stream.record()).wait(soon()));
}

/// A word has four bytes at a multiple of four.
pub fn what_is_no_word_is_refused(fixture: &Fixture) {
    let memory = fixture.allocate(64);
    let mut stream = fixture.stream();
    for (offset, bytes) in [(0, 0), (0, 3), (0, 8), (1, 4), (2, 4), (7, 4)] {
        let word = slice(&memory, offset, bytes);
        let expected = DeviceError::NotAWord { offset, bytes };
        assert_eq!(refused(stream.write_word(&word, 1)), expected);
        assert_eq!(refused(fixture.device.set_word(&word, 1)), expected);
        assert_eq!(refused(fixture.device.word(&word)), expected);
        assert_eq!(refused(fixture.device.wait_doorbell(fixture.execution, &word, soon())), expected);
    }
    for (offset, bytes) in [(0, 3), (2, 8), (4, 6)] {
        let expected = DeviceError::NotAWord { offset, bytes };
        assert_eq!(refused(stream.clear_words(&slice(&memory, offset, bytes))), expected);
    }
    drop(stream);
    assert_eq!(fixture.get(&whole(&memory)), [0; 64]);
}

/// Another device's memory is refused, whatever its address.
pub fn foreign_memory_is_refused(fixture: &Fixture) {
    let other = done(open_device(DeviceId::Host(u32::MAX), LinkThrottle::default()));
    let memory = done(other.allocate(4));
    let (foreign, host) = (whole(&memory), fixture.pinned(&[1; 4]));
    let mut stream = fixture.stream();
    let device = fixture.device.properties().id;
    let expected = DeviceError::ForeignMemory { device, memory: DeviceId::Host(u32::MAX) };
    assert_eq!(refused(stream.copy_in(&host, &foreign)), expected);
    assert_eq!(refused(stream.copy_out(&foreign, &host)), expected);
    let own = fixture.allocate(4);
    assert_eq!(refused(stream.copy_within(&whole(&own), &foreign)), expected);
    assert_eq!(refused(stream.copy_within(&foreign, &whole(&own))), expected);
    assert_eq!(refused(stream.write_word(&foreign, 1)), expected);
    assert_eq!(refused(fixture.device.set_word(&foreign, 1)), expected);
    assert_eq!(refused(fixture.device.word(&foreign)), expected);
    assert_eq!(refused(fixture.device.wait_doorbell(fixture.execution, &foreign, soon())), expected);
    assert_eq!(done(other.word(&foreign)), doorbell::CLEAR);
}

/// Nothing and more than there is cannot be allocated, and the error has the numbers.
pub fn impossible_allocations_are_refused(fixture: &Fixture) {
    let properties = fixture.device.properties();
    let (device, capacity_bytes) = (properties.id, properties.total_memory_bytes);
    assert_eq!(refused(fixture.device.allocate(0)), DeviceError::EmptyAllocation);
    for asked_bytes in [capacity_bytes + 1, u64::MAX] {
        let expected = DeviceError::NeverFits { device, asked_bytes, capacity_bytes };
        assert_eq!(refused(fixture.device.allocate(asked_bytes)), expected);
    }
}

/// A handle's description is not trusted.
pub fn malformed_handles_are_refused(fixture: &Fixture) {
    let memory = fixture.allocate(4_096);
    let parts = || done(memory.export()).into_parts();
    let malformed = |description: &[u8], descriptors| {
        let error = refused(MemoryHandle::from_parts(description, descriptors));
        assert!(matches!(error, DeviceError::MalformedHandle { .. }), "{error:?}");
    };
    let (description, descriptors) = parts();
    malformed(&description[..description.len() - 1], descriptors);
    let (description, descriptors) = parts();
    malformed(&[&description[..], &[0]].concat(), descriptors);
    let (_, descriptors) = parts();
    malformed(&[], descriptors);
    let (_, descriptors) = parts();
    malformed(&[u8::MAX; 16], descriptors);
    // One descriptor too many, whether the handle comes with any or not.
    let (description, mut descriptors) = parts();
    descriptors.push(std::fs::File::open("/dev/null").expect("it is always there").into());
    malformed(&description, descriptors);
    // As it should be.
    let (description, descriptors) = parts();
    let opened = done(fixture.device.open(done(MemoryHandle::from_parts(&description, descriptors))));
    fixture.put(&whole(&opened), &pattern(1, 4_096));
    assert_eq!(fixture.get(&whole(&memory)), pattern(1, 4_096));
}
