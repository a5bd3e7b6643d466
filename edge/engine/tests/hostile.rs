//! Hostile model files: damaged bytes, absurd sizes, graphs that make no sense. An error or another model, but no panic, no endless walk and
//! not much memory, at load and at the first run.
#![allow(unsafe_code, reason = "a global allocator that measures")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the reference arithmetic of the test"
)]
#![allow(clippy::unwrap_used, reason = "test code")]

mod model_file;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{LoadError, Model, Options};
use model_file::{Network, Random, integers};
use prost::Message as _;
use tract_onnx::pb::tensor_shape_proto::dimension::Value;
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, ValueInfoProto, type_proto};

/// Most memory at a time.
const MOST_BYTES: usize = 256 << 20;

struct Measuring;

static LIVE: AtomicUsize = AtomicUsize::new(0);

/// Refuses what would take the process beyond [`MOST_BYTES`], which ends it.
// SAFETY: every call goes on to the system's allocator unchanged, or is refused.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size() > MOST_BYTES {
            LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
            return std::ptr::null_mut();
        }
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Measuring = Measuring;

const IMAGE: [usize; 3] = [3, 22, 22];

/// A quantized chain, a float chain, and a quantized graph that is none.
fn files() -> [Vec<u8>; 3] {
    let network = Network::random(21, IMAGE, &[8, 4], &[4, 1]);
    let padded = changed(&network.file(), |graph| {
        let convolutions = graph.node.iter_mut().filter(|node| node.op_type == "Conv");
        convolutions.for_each(|node| node.attribute.push(integers("pads", &[0, 0, 0, 0])));
        let pool = graph.node.iter_mut().find(|node| node.op_type == "MaxPool");
        pool.unwrap().op_type = "AveragePool".to_owned();
    });
    [network.file(), network.float_file(), padded]
}

fn changed(file: &[u8], change: impl FnOnce(&mut GraphProto)) -> Vec<u8> {
    let mut proto = ModelProto::decode(file).unwrap();
    change(proto.graph.as_mut().unwrap());
    proto.encode_to_vec()
}

/// Loads a file and, where it is a model of small images, runs one; the error of the load.
fn try_it(file: &[u8]) -> Option<LoadError> {
    let model = match Model::load(file, &Options::default()) {
        Ok(model) => model,
        Err(error) => return Some(error),
    };
    let mut session = model.session();
    let image = Random::new(3).bytes(IMAGE.iter().product());
    drop(session.logits(&image, &mut [0.0]));
    None
}

#[test]
fn damaged_bytes_never_panic() {
    let mut random = Random::new(5);
    for file in files() {
        for _ in 0..1500 {
            let mut damaged = file.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(damaged.len() as u64) as usize;
                let byte = random.below(256) as u8;
                match random.below(4) {
                    0 => damaged.truncate(at.max(1)),
                    1 => damaged.insert(at, byte),
                    2 => drop(damaged.remove(at)),
                    _ => damaged[at] = byte,
                }
                if damaged.is_empty() {
                    break;
                }
            }
            try_it(&damaged);
        }
    }
}

/// Numbers that stand for sizes, small ones and absurd ones.
const SIZES: [i64; 9] = [0, 1, -1, 2, 7, 1 << 16, 1 << 31, 1 << 40, i64::MAX];

#[test]
fn graphs_that_make_no_sense_never_panic() {
    let mut random = Random::new(7);
    for file in files() {
        for _ in 0..1500 {
            let mut proto = ModelProto::decode(file.as_slice()).unwrap();
            for _ in 0..=random.below(3) {
                spoil(proto.graph.as_mut().unwrap(), &mut random);
            }
            try_it(&proto.encode_to_vec());
        }
    }
}

/// One of them; `None` of none.
fn pick<'a, T>(random: &mut Random, of: &'a mut [T]) -> Option<&'a mut T> {
    let index = random.below(of.len().max(1) as u64) as usize;
    of.get_mut(index)
}

/// One change that leaves an ONNX file; none where what was picked has nothing to change.
fn spoil(graph: &mut GraphProto, random: &mut Random) -> Option<()> {
    let size = SIZES[random.below(SIZES.len() as u64) as usize];
    let values = graph.node.iter().flat_map(|node| &node.output);
    let constants = graph.initializer.iter().map(|tensor| &tensor.name);
    let mut names: Vec<String> = values.chain(constants).cloned().collect();
    names.extend(["".to_owned(), "image".to_owned()]);
    let name = pick(random, &mut names)?.clone();
    match random.below(16) {
        0..4 => spoil_constant(graph, random, size),
        4 => drop(
            graph
                .initializer
                .swap_remove(index(random, &graph.initializer)?),
        ),
        5 => drop(graph.node.swap_remove(index(random, &graph.node)?)),
        6..9 => **pick(random, &mut dimensions(graph.input.first_mut()?))? = Value::DimValue(size),
        9 => {
            let other = pick(random, &mut graph.node)?.op_type.clone();
            pick(random, &mut graph.node)?.op_type = other;
        }
        _ => return spoil_node(pick(random, &mut graph.node)?, random, size, name),
    }
    Some(())
}

fn spoil_constant(graph: &mut GraphProto, random: &mut Random, size: i64) {
    let Some(tensor) = pick(random, &mut graph.initializer) else {
        return;
    };
    match random.below(4) {
        0 => tensor.dims.push(size),
        1 => drop(tensor.dims.pop()),
        2 => tensor.data_type = random.below(18) as i32,
        _ => pick(random, &mut tensor.dims).map_or((), |dimension| *dimension = size),
    }
}

fn spoil_node(node: &mut NodeProto, random: &mut Random, size: i64, name: String) -> Option<()> {
    match random.below(8) {
        0 => *pick(random, &mut node.input)? = name,
        1 => *pick(random, &mut node.output)? = name,
        2 => node.input.push(name),
        3 => drop(node.input.pop()),
        4 => drop(node.output.pop()),
        5 => drop(node.attribute.pop()),
        6 => pick(random, &mut node.attribute)?.i = size,
        _ => {
            let attribute = pick(random, &mut node.attribute)?;
            *pick(random, &mut attribute.ints)? = size;
        }
    }
    Some(())
}

fn index<T>(random: &mut Random, of: &[T]) -> Option<usize> {
    (!of.is_empty()).then(|| random.below(of.len() as u64) as usize)
}

/// The dimensions of an input that are numbers or names.
fn dimensions(input: &mut ValueInfoProto) -> Vec<&mut Value> {
    let value = input.r#type.as_mut().and_then(|of| of.value.as_mut());
    let Some(type_proto::Value::TensorType(tensor)) = value else {
        return Vec::new();
    };
    let dimensions = tensor.shape.iter_mut().flat_map(|shape| &mut shape.dim);
    dimensions.filter_map(|size| size.value.as_mut()).collect()
}
