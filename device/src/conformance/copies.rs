use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Fixture, done, pattern, slice, soon, whole};
use crate::{DeviceError, HostSlice, SharedMemory};

/// Allocated memory holds zeros, also after memory full of something else was freed.
pub fn memory_begins_with_zeros(fixture: &Fixture) {
    for _ in 0..3 {
        let memory = fixture.allocate(300_001);
        assert!(fixture.get(&whole(&memory)).iter().all(|&byte| byte == 0));
        fixture.put(&whole(&memory), &[0xA5; 300_001]);
    }
}

/// Copies in both directions move exactly their bytes, whatever the alignment.
pub fn copies_at_odd_places_and_of_odd_sizes_arrive(fixture: &Fixture) {
    const BYTES: usize = 1 << 20;
    let memory = fixture.allocate(BYTES as u64);
    let mut expected = vec![0; BYTES];
    let mut stream = fixture.stream();
    let places = [
        (0, 1),
        (1, 1),
        (3, 7),
        (4_095, 2),
        (511, 513),
        (10_000, 4_096),
        (65_537, 100_003),
        (999_999, 48_577),
    ];
    for (seed, (offset, bytes)) in (0_u64..).zip(places) {
        // The host's end is at an odd place too.
        let source = fixture.pinned(&pattern(seed, bytes + 13));
        let source = done(source.sub(13, bytes as u64));
        done(stream.copy_in(&source, &slice(&memory, offset as u64, bytes as u64)));
        done(source.read(0, &mut expected[offset..offset + bytes]));
    }
    done(done(stream.record()).wait(soon()));
    assert_eq!(fixture.get(&whole(&memory)), expected);
    for (offset, bytes) in places {
        let target = fixture.pinned(&vec![0xEE; bytes + 34]);
        let middle = done(target.sub(17, bytes as u64));
        done(stream.copy_out(&slice(&memory, offset as u64, bytes as u64), &middle));
        done(done(stream.record()).wait(soon()));
        let mut found = vec![0; bytes + 34];
        done(target.read(0, &mut found));
        assert_eq!(found[17..17 + bytes], expected[offset..offset + bytes]);
        assert!(found[..17].iter().chain(&found[17 + bytes..]).all(|&byte| byte == 0xEE), "written outside");
    }
}

/// Memory that is lent, not pinned, is copied in the order of the stream, too.
pub fn lent_memory_is_copied(fixture: &Fixture) {
    const BYTES: usize = 300_001;
    let content = pattern(5, BYTES);
    let lent = Arc::new(done(SharedMemory::create("conformance", BYTES as u64)));
    done(lent.write(0, &content));
    let from = done(HostSlice::new(fixture.device.lend(lent), 0, BYTES as u64));
    let memory = fixture.allocate(BYTES as u64);
    let mut stream = fixture.stream();
    done(stream.copy_in(&fixture.pinned(&[0xFF; BYTES]), &whole(&memory)));
    done(stream.copy_in(&from, &whole(&memory)));
    done(done(stream.record()).wait(soon()));
    assert_eq!(fixture.get(&whole(&memory)), content);
}

/// A stream does thousands of copies, later ones over earlier ones.
pub fn many_small_copies_arrive_in_order(fixture: &Fixture) {
    const COPIES: u64 = 3_000;
    let memory = fixture.allocate(4_096);
    let source = fixture.pinned(&pattern(7, 4_096));
    let mut expected = vec![0; 4_096];
    let mut stream = fixture.stream();
    for copy in 0..COPIES {
        let bytes = copy % 97;
        let (from, to) = ((copy * 31) % 3_900, (copy * 17) % 3_900);
        let piece = done(source.sub(from, bytes));
        done(stream.copy_in(&piece, &slice(&memory, to, bytes)));
        let to = usize::try_from(to).expect("small");
        done(piece.read(0, &mut expected[to..to + usize::try_from(bytes).expect("small")]));
    }
    done(done(stream.record()).wait(soon()));
    assert_eq!(fixture.get(&whole(&memory)), expected);
}

/// Copies within the device come in the order of the stream, between those from and to the host.
pub fn what_is_set_aside_within_the_device_is_there_before_it_is_overwritten(fixture: &Fixture) {
    const BYTES: u64 = 300_001;
    let memory = fixture.allocate(2 * BYTES + 5);
    let (here, aside) = (slice(&memory, 1, BYTES), slice(&memory, BYTES + 3, BYTES));
    let [old, new] = [11, 12].map(|seed| pattern(seed, 300_001));
    let target = fixture.pinned(&vec![0xEE; 300_001]);
    let mut stream = fixture.stream();
    for _ in 0..3 {
        done(stream.copy_in(&fixture.pinned(&old), &here));
        done(stream.copy_within(&here, &aside));
        done(stream.copy_in(&fixture.pinned(&new), &here));
        done(stream.copy_out(&aside, &target));
    }
    done(done(stream.record()).wait(soon()));
    let mut found = vec![0; 300_001];
    done(target.read(0, &mut found));
    assert!(found == old && fixture.get(&here) == new && fixture.get(&aside) == old);
    assert_eq!(fixture.get(&slice(&memory, BYTES + 1, 2)), [0; 2]);
}

/// Empty copies are allowed everywhere, also at the very end.
pub fn copies_of_nothing_do_nothing(fixture: &Fixture) {
    let memory = fixture.allocate(64);
    let host = fixture.pinned(&[1; 64]);
    let mut stream = fixture.stream();
    for offset in [0, 1, 64] {
        let nothing = done(host.sub(offset, 0));
        done(stream.copy_in(&nothing, &slice(&memory, offset, 0)));
        done(stream.copy_out(&slice(&memory, offset, 0), &nothing));
        done(stream.copy_within(&slice(&memory, offset, 0), &slice(&memory, offset, 0)));
    }
    done(done(stream.record()).wait(soon()));
    assert_eq!(fixture.get(&whole(&memory)), [0; 64]);
}

/// Both ends of a copy live until it is done, though the caller has dropped them.
pub fn copies_keep_their_memory_alive(fixture: &Fixture) {
    let kept = fixture.allocate(1 << 20);
    let content = pattern(3, 1 << 20);
    let mut stream = fixture.stream();
    for _ in 0..8 {
        let dropped = fixture.allocate(1 << 20);
        done(stream.copy_in(&fixture.pinned(&content), &whole(&dropped)));
    }
    done(stream.copy_in(&fixture.pinned(&content), &whole(&kept)));
    done(done(stream.record()).wait(soon()));
    assert_eq!(fixture.get(&whole(&kept)), content);
}

/// Two streams work at the same time, one in each direction.
pub fn both_directions_at_once_do_not_mix(fixture: &Fixture) {
    const BYTES: usize = 256 * 1024;
    let (inward, outward) = (fixture.allocate(BYTES as u64), fixture.allocate(BYTES as u64));
    fixture.put(&whole(&outward), &pattern(1, BYTES));
    let (source, target) = (fixture.pinned(&pattern(2, BYTES)), fixture.pinned(&vec![0; BYTES]));
    let (mut into, mut out) = (fixture.stream(), fixture.stream());
    for piece in 0..64 {
        let at = |memory| slice(memory, piece * 4_096, 4_096);
        done(into.copy_in(&done(source.sub(piece * 4_096, 4_096)), &at(&inward)));
        done(out.copy_out(&at(&outward), &done(target.sub(piece * 4_096, 4_096))));
    }
    done(done(into.record()).wait(soon()));
    done(done(out.record()).wait(soon()));
    let mut found = vec![0; BYTES];
    done(target.read(0, &mut found));
    assert!(found == pattern(1, BYTES), "what was copied out differs");
    assert!(fixture.get(&whole(&inward)) == pattern(2, BYTES), "what was copied in differs");
}

/// What was enqueued is done before `drop` returns: nobody waits in vain for a doorbell.
pub fn a_dropped_stream_finishes_its_queue(fixture: &Fixture) {
    let memory = fixture.allocate((1 << 20) + 4);
    let word = slice(&memory, 1 << 20, 4);
    let content = pattern(5, 1 << 20);
    let source = fixture.pinned(&content);
    let mut stream = fixture.stream();
    for _ in 0..16 {
        done(stream.copy_in(&source, &slice(&memory, 0, 1 << 20)));
    }
    done(stream.write_word(&word, 77));
    let event = done(stream.record());
    drop(stream);
    assert!(done(event.is_complete()));
    assert_eq!(done(fixture.device.word(&word)), 77);
    assert_eq!(fixture.get(&slice(&memory, 0, 1 << 20)), content);
}

/// Events of one stream complete in the order in which they were recorded, and stay complete.
pub fn events_complete_in_order(fixture: &Fixture) {
    let memory = fixture.allocate(1 << 20);
    let source = fixture.pinned(&pattern(9, 1 << 20));
    let mut stream = fixture.stream();
    let began = Instant::now();
    let events: Vec<_> = (0..20)
        .map(|_| {
            done(stream.copy_in(&source, &whole(&memory)));
            done(stream.record())
        })
        .collect();
    done(events[19].wait(soon()));
    assert!(events.iter().all(|event| done(event.is_complete())));
    let times: Vec<Instant> =
        events.iter().map(|event| event.completed_at().expect("it is complete")).collect();
    assert!(times.is_sorted(), "an event completed before one that was recorded earlier");
    assert!(times[0] >= began && times[19] <= Instant::now());
    // A wait for what has passed returns at once, even after its deadline.
    done(events[0].wait(began));
}

/// A wait for work that cannot finish in time gives up.
pub fn an_event_waits_no_longer_than_its_deadline(fixture: &Fixture) {
    const PATIENCE: Duration = Duration::from_micros(100);
    let memory = fixture.allocate(8 << 20);
    let source = fixture.pinned(&pattern(4, 8 << 20));
    // This thread may be kept from running while the copies are made: try again with more of them.
    for copies in [20, 100, 500] {
        let mut stream = fixture.stream();
        for _ in 0..copies {
            done(stream.copy_in(&source, &whole(&memory)));
        }
        let event = done(stream.record());
        let began = Instant::now();
        match event.wait(began + PATIENCE) {
            Ok(()) => {}
            Err(DeviceError::TimedOut { waited, .. }) => {
                // It counts from when it began itself, a little later.
                assert!(waited <= began.elapsed() && began.elapsed() >= PATIENCE, "gave up after {waited:?}");
                return done(event.wait(soon()));
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    panic!("4 GB were copied in {PATIENCE:?}");
}

/// A copy behind a wait for another stream's event finds what that stream has copied before, however long that takes, and a
/// wait for what has passed holds nothing up.
pub fn a_stream_waits_for_events_of_another(fixture: &Fixture) {
    const BYTES: usize = 4 << 20;
    const ROUNDS: u64 = 8;
    let memory = fixture.allocate(BYTES as u64);
    let place = whole(&memory);
    fixture.put(&place, &pattern(0, BYTES));
    let contents: Vec<_> = (1..=ROUNDS).map(|round| fixture.pinned(&pattern(round, BYTES))).collect();
    let saved: Vec<_> = (0..ROUNDS).map(|_| fixture.pinned(&vec![0; BYTES])).collect();
    let (mut into, mut out) = (fixture.stream(), fixture.stream());
    // Out with the old before the new comes in, and in with it before it goes out again.
    let mut passed = Vec::new();
    for (content, saved) in contents.iter().zip(&saved) {
        done(out.copy_out(&place, saved));
        let gone = done(out.record());
        done(into.wait_event(&gone));
        done(into.copy_in(content, &place));
        let arrived = done(into.record());
        done(out.wait_event(&arrived));
        passed.push(arrived);
    }
    done(done(out.record()).wait(soon()));
    for (round, saved) in (0..).zip(&saved) {
        let mut found = vec![0; BYTES];
        done(saved.read(0, &mut found));
        assert!(found == pattern(round, BYTES), "round {round} was saved too early or too late");
    }
    assert!(fixture.get(&place) == pattern(ROUNDS, BYTES));
    // All of these have been passed, most of them long ago.
    let mut late = fixture.stream();
    passed.iter().for_each(|event| done(late.wait_event(event)));
    done(done(late.record()).wait(soon()));
}
