//! After the first slice a session allocates nothing, on one thread and on several.
#![allow(unsafe_code, reason = "a global allocator that counts")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the reference arithmetic of the test"
)]

mod model_file;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{Model, Options};
use model_file::{Network, Random};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// One test in this file, because the counter is the process's.
#[test]
fn a_slice_allocates_nothing_after_the_first() {
    let image = [3, 46, 46];
    let file = Network::random(11, image, &[32, 16, 8], &[16, 1]).file();
    let images = Random::new(12).bytes(10 * image.iter().product::<usize>());
    for threads in [1, 2, 4] {
        let model = Model::load(
            &file,
            &Options {
                kernel: None,
                threads,
                ..Options::default()
            },
        )
        .unwrap();
        let mut session = model.session();
        let mut logits = [0.0; 10];
        session.logits(&images, &mut logits).unwrap();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        session.logits(&images, &mut logits).unwrap();
        assert_eq!(
            ALLOCATIONS.load(Ordering::Relaxed),
            before,
            "{threads} threads"
        );
    }
}
