use std::thread;
use std::time::{Duration, Instant};

use super::{Fixture, done, pattern, refused, slice, soon, whole};
use crate::{DeviceError, ExecutionStream, doorbell};

/// Long enough that a waiter is most likely asleep; the tests hold as well if it is not.
const A_WHILE: Duration = Duration::from_millis(20);

/// Whoever sees a word sees all bytes that were copied before it.
pub fn a_word_follows_the_copies_before_it(fixture: &Fixture) {
    const BYTES: u64 = 64 * 1024;
    let memory = fixture.allocate(BYTES + 4);
    let (group, word) = (slice(&memory, 0, BYTES), slice(&memory, BYTES, 4));
    let mut stream = fixture.stream();
    for round in 0..50 {
        done(fixture.device.set_word(&word, doorbell::CLEAR));
        let content = pattern(round, 64 * 1024);
        done(stream.copy_in(&fixture.pinned(&content), &group));
        done(stream.write_word(&word, doorbell::RUNG));
        done(fixture.wait(&word, soon()));
        // By another stream, which knows nothing of the first one.
        assert!(fixture.get(&group) == content, "the doorbell came before its bytes in round {round}");
    }
}

/// `set_word` has stored when it returns, `word` reads what is there.
pub fn words_can_be_set_and_read_past_all_streams(fixture: &Fixture) {
    let memory = fixture.allocate(64);
    for offset in [0, 4, 60] {
        let word = slice(&memory, offset, 4);
        for value in [doorbell::RUNG, u32::MAX, 0x0403_0201] {
            done(fixture.device.set_word(&word, value));
            assert_eq!(done(fixture.device.word(&word)), value);
        }
        assert_eq!(fixture.get(&word), [1, 2, 3, 4], "words are little-endian");
    }
    assert_eq!(fixture.get(&slice(&memory, 8, 52)), [0; 52], "neighbours were touched");
}

/// A range of words is cleared, in the order of the stream, and nothing beside it.
pub fn a_stream_clears_a_range_of_words(fixture: &Fixture) {
    const WORDS: u64 = 3000;
    let memory = fixture.allocate(4 * WORDS + 8);
    let mut stream = fixture.stream();
    done(stream.copy_in(&fixture.pinned(&vec![1; 4 * 3000 + 8]), &whole(&memory)));
    done(stream.clear_words(&slice(&memory, 4, 4 * WORDS)));
    done(stream.write_word(&slice(&memory, 8, 4), doorbell::RUNG));
    done(stream.clear_words(&slice(&memory, 4, 0)));
    done(done(stream.record()).wait(soon()));
    let mut expected = vec![0; 4 * 3000 + 8];
    expected[..4].fill(1);
    expected[4 * 3000 + 4..].fill(1);
    expected[8] = 1;
    assert!(fixture.get(&whole(&memory)) == expected);
}

/// A doorbell that was rung holds nobody up.
pub fn a_wait_after_the_ring_goes_on(fixture: &Fixture) {
    let memory = fixture.allocate(4);
    let mut stream = fixture.stream();
    done(stream.write_word(&whole(&memory), doorbell::RUNG));
    done(done(stream.record()).wait(soon()));
    done(fixture.wait(&whole(&memory), soon()));
    // Whoever is late, but not in vain, is not turned away.
    done(fixture.wait(&whole(&memory), Instant::now()));
}

/// A waiter goes on when a stream or the host rings, and not before.
pub fn a_wait_before_the_ring_is_released(fixture: &Fixture) {
    let memory = fixture.allocate(4);
    let word = whole(&memory);
    for by_a_stream in [true, false] {
        done(fixture.device.set_word(&word, doorbell::CLEAR));
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                done(fixture.wait(&word, soon()));
                Instant::now()
            });
            thread::sleep(A_WHILE);
            let rang_at = Instant::now();
            if by_a_stream {
                done(fixture.stream().write_word(&word, doorbell::RUNG));
            } else {
                done(fixture.device.set_word(&word, doorbell::RUNG));
            }
            assert!(waiter.join().expect("the waiter panicked") >= rang_at, "it went on before the ring");
        });
    }
}

/// One ring releases all who wait.
pub fn many_waiters_are_released(fixture: &Fixture) {
    let memory = fixture.allocate(4);
    let word = whole(&memory);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| done(fixture.wait(&word, soon())));
        }
        thread::sleep(A_WHILE);
        done(fixture.stream().write_word(&word, doorbell::RUNG));
    });
}

/// Poison releases who waits and turns away who comes.
pub fn poison_releases_waiters(fixture: &Fixture) {
    let memory = fixture.allocate(4);
    let word = whole(&memory);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| refused(fixture.wait(&word, soon())));
        thread::sleep(A_WHILE);
        done(fixture.device.set_word(&word, doorbell::POISONED));
        assert_eq!(waiter.join().expect("the waiter panicked"), DeviceError::Poisoned);
    });
    assert_eq!(refused(fixture.wait(&word, soon())), DeviceError::Poisoned);
    done(fixture.device.set_word(&word, doorbell::RUNG));
    done(fixture.wait(&word, soon()));
}

/// Where a wait blocks the caller, it gives up at its deadline. Streams that wait by themselves know none.
pub fn a_blocking_wait_ends_at_its_deadline(fixture: &Fixture) {
    if fixture.execution != ExecutionStream::Host {
        return;
    }
    let memory = fixture.allocate(4);
    for patience in [Duration::ZERO, A_WHILE] {
        let began = Instant::now();
        let error = refused(fixture.wait(&whole(&memory), began + patience));
        let DeviceError::TimedOut { waited, .. } = error else { panic!("{error:?}") };
        assert!(
            waited >= patience && began.elapsed() >= patience,
            "it gave up after {waited:?} of {patience:?}"
        );
    }
}
