//! What the fuzz targets `rings` and `cut` run.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::segment::{Cut, MOST_HEADERS};
use super::testing::{BASE, BUFFERS, FakeGuest, LEN, RING_AREA, engine_for, socket_link};
use super::vnet;

/// Times the engine runs on one memory.
const STEPS: usize = 6;
/// Most rounds of changes to the memory meanwhile, however slow the engine is.
const ROUNDS: usize = 512;
/// Bytes of one change: where, and the word written there.
const CHANGE: usize = 5;

/// Runs the engine on rings whose memory is `bytes`, with two links, while another thread changes that memory: whatever they
/// are, it must return.
///
/// The first two bytes give the available indices, the third the number of changes, which follow; the rest is spread over
/// both ring areas and the buffers.
///
/// # Errors
/// When the kernel gives no memory file or sockets.
pub fn run_on_hostile_memory(bytes: &[u8]) -> io::Result<()> {
    let mut guest = FakeGuest::new(64, bytes.len().is_multiple_of(2))?;
    let (claims, rest) = bytes.split_at(bytes.len().min(2));
    let (count, rest) = rest.split_first().unwrap_or((&0, &[]));
    let changes = usize::from(count % 32) * CHANGE;
    let (changes, rest) = rest.split_at(changes.min(rest.len()));
    for (i, chunk) in rest.chunks(1024).enumerate() {
        let at = match i % 3 {
            0 => BASE,
            1 => BASE + RING_AREA,
            _ => BUFFERS,
        };
        guest.write(at + 1024 * (i / 3) as u64, chunk);
    }
    for (queue, claim) in claims.iter().enumerate() {
        guest.claim(queue, u16::from(*claim));
    }
    let memory = guest.file().try_clone()?;
    let over = AtomicBool::new(changes.is_empty());
    std::thread::scope(|scope| {
        if !changes.is_empty() {
            scope.spawn(|| change(&memory, changes, &over));
        }
        let ran = run_engine(&guest);
        over.store(true, Ordering::Relaxed);
        ran
    })
}

fn run_engine(guest: &FakeGuest) -> io::Result<()> {
    let (mut engine, _) = engine_for(guest)?;
    let (pod, _) = socket_link(&mut engine, 16)?;
    let (_other, _) = socket_link(&mut engine, 17)?;
    for _ in 0..STEPS {
        // A full socket buffer refuses the frame, which is as good as none.
        let _ = pod.send(&[0x55; 200]);
        engine.step();
        engine.arm();
        engine.disarm();
    }
    Ok(())
}

/// Writes each change again and again, as a guest on another core does; what it replaces comes back in between.
fn change(memory: &File, changes: &[u8], over: &AtomicBool) {
    for round in 0..ROUNDS {
        for change in changes.chunks_exact(CHANGE) {
            if over.load(Ordering::Relaxed) {
                return;
            }
            let [high, middle, low, value @ ..] = change else {
                return;
            };
            let at = u64::from(u32::from_be_bytes([0, *high, *middle, *low])) % LEN;
            let mut value = [value[0], value[1]];
            if round % 2 == 1 {
                value = value.map(|byte| !byte);
            }
            // A change at the last byte is cut short, which is as good as any.
            let _ = memory.write_at(&value[..value.len().min((LEN - at) as usize)], at);
        }
    }
}

/// Cuts a frame with any vnet header and any headers of its own. Holds: the segments together carry the payload once, each
/// has room for its headers, and their number is bounded.
///
/// The first twelve bytes are the vnet header, two more give the length of the payload that is not at hand, the rest is the
/// beginning of the frame.
///
/// # Panics
/// If what has to hold does not.
pub fn cut_any_frame(bytes: &[u8]) {
    let Some((header, [high, low, front @ ..])) = bytes.split_first_chunk::<{ vnet::HEADER }>()
    else {
        return;
    };
    let mut header = *header;
    let Ok(tunnelled) = vnet::to_tap(&mut header) else {
        return;
    };
    let total = front.len() + usize::from(u16::from_be_bytes([*high, *low]));
    let Some(cut) = Cut::new(&header, tunnelled, front, total) else {
        return;
    };
    assert!(cut.count() <= 1024, "{cut:?}");
    let mut headers = [0; MOST_HEADERS];
    let mut end = None;
    for index in 0..cut.count() {
        // No IP packet is as long as that: the frame is dropped.
        let Some((length, payload)) = cut.segment(index, &mut headers) else {
            return;
        };
        assert!(length <= MOST_HEADERS && !payload.is_empty(), "{cut:?}");
        assert_eq!(payload.start, end.unwrap_or(length), "{cut:?}");
        end = Some(payload.end);
    }
    assert_eq!(end, Some(total), "{cut:?}");
    assert!(
        cut.segment(cut.count(), &mut headers)
            .is_none_or(|(_, payload)| payload.is_empty())
    );
}
