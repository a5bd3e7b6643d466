//! After `Preprocessor::new`, no slice makes it allocate: neither the first one nor one of another size or format.
#![allow(
    unsafe_code,
    reason = "a global allocator that counts can only be written with it"
)]

mod scene;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use shared::TENSOR_BYTES;
use shared::hounsfield::Rescale;
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;
use shared::stored::{PixelFormat, SlicePixels};

thread_local! {
    static N_ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, counting the allocations of each thread.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came; counting neither allocates nor fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps `alloc`'s conditions, which are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s conditions, and `alloc` above gave the system's memory.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(call: impl FnOnce()) -> usize {
    let before = N_ALLOCATIONS.with(Cell::get);
    call();
    N_ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations_of(|| drop(std::hint::black_box(vec![1_u8]))), 1);
}

#[test]
fn no_slice_allocates_after_set_up() {
    let bytes = scene::chest();
    let first = scene::chest_slice(&bytes);
    let unsigned = PixelFormat {
        is_signed: false,
        bits_stored: 12,
        high_bit: 11,
        ..first.format
    };
    let wide = PixelFormat {
        bits_allocated: 32,
        bits_stored: 32,
        high_bit: 31,
        ..first.format
    };
    let slices = [
        first,
        SlicePixels {
            rescale: Rescale {
                slope: 0.5,
                intercept: 3.0,
            },
            ..first
        },
        SlicePixels {
            rows: 400,
            columns: 300,
            format: unsigned,
            ..first
        },
        SlicePixels {
            rows: 200,
            columns: 500,
            format: wide,
            ..first
        },
        first,
    ];
    let mut preprocessor = Preprocessor::new(&PreprocessSpec::default()).unwrap();
    let mut out = vec![0; TENSOR_BYTES];
    for slice in slices {
        assert_eq!(
            allocations_of(|| preprocessor.tensor(&slice, &mut out).unwrap()),
            0
        );
    }
    let too_narrow = SlicePixels { rows: 1, ..first };
    assert_eq!(
        allocations_of(|| assert!(preprocessor.tensor(&too_narrow, &mut out).is_err())),
        0
    );
}
