//! Rows of pooled outputs: one convolution over the columns that must be computed, constants elsewhere.

use std::ops::Range;

use crate::idle::Idle;
use crate::kernels::{self, ConvRow, WinogradRow, WinogradScratch};
use crate::network::{Network, Weights};
use crate::patches::{self, gather_patches};

/// One pooled row of the first convolution.
pub(crate) fn first_row(
    network: &Network,
    image: &[u8],
    row: usize,
    patches: &mut [u8],
    idle: &mut Idle,
    scratch: &mut WinogradScratch,
    out: &mut [u8],
) {
    gather_patches(network.image, image, 2 * row, patches);
    let bottom = patches::bytes_per_line(network.image[0]);
    let rows: [&[u8]; 2] = [patches, &patches[bottom..]];
    pooled_row_of_image(network, image, 0, row, &rows, idle, scratch, out);
}

/// One pooled row of one of the first two convolutions, all channels; what `idle` knows is not computed.
#[expect(
    clippy::too_many_arguments,
    reason = "the buffers are one thread's, the rest is where it stands"
)]
pub(crate) fn pooled_row_of_image(
    network: &Network,
    image: &[u8],
    level: usize,
    row: usize,
    rows: &[&[u8]],
    idle: &mut Idle,
    scratch: &mut WinogradScratch,
    out: &mut [u8],
) {
    if !idle.mark(network, image, level, row, scratch) {
        return pooled_row(network, level, rows, scratch, out);
    }
    let convolution = &network.convolutions[level];
    let stride = convolution.channel_stride();
    for (span, constant) in idle.spans(level, convolution.pooled[1]) {
        match constant {
            None => pooled_span(network, level, rows, span, scratch, out),
            Some(pixel) => out[span.start * stride..span.end * stride]
                .chunks_exact_mut(stride)
                .for_each(|to| to.copy_from_slice(pixel)),
        }
    }
}

/// One pooled row of a convolution, all channels.
pub(crate) fn pooled_row(
    network: &Network,
    layer: usize,
    rows: &[&[u8]],
    scratch: &mut WinogradScratch,
    out: &mut [u8],
) {
    let n_columns = network.convolutions[layer].pooled[1];
    pooled_span(network, layer, rows, 0..n_columns, scratch, out);
}

/// Some columns of a pooled row, all channels. `rows` and `out` are whole rows.
pub(crate) fn pooled_span(
    network: &Network,
    layer: usize,
    rows: &[&[u8]],
    columns: Range<usize>,
    scratch: &mut WinogradScratch,
    out: &mut [u8],
) {
    let convolution = &network.convolutions[layer];
    let column_bytes = convolution.column_bytes;
    let out_stride = convolution.channel_stride();
    let out = &mut out[columns.start * out_stride..];
    let n_columns = columns.len();
    let mut spans: [&[u8]; 4] = [&[]; 4];
    for (span, row) in spans.iter_mut().zip(rows) {
        *span = &row[2 * columns.start * column_bytes..];
    }
    match &convolution.weights {
        Weights::Winograd(layer) => {
            let row = WinogradRow {
                layer,
                rows: spans,
                column_bytes,
                n_columns,
                out_stride,
            };
            kernels::winograd_row(network.kernel, &row, scratch, out);
        }
        Weights::Direct(blocks) => {
            for block in blocks {
                let row = ConvRow {
                    rows: &spans[..rows.len()],
                    column_bytes,
                    kernel_row_bytes: convolution.kernel_row_bytes,
                    weights: &block.weights,
                    bias: &block.bias,
                    scale: &block.scale,
                    n_columns,
                    out_stride,
                };
                kernels::conv_row(network.kernel, &row, &mut out[block.first_channel..]);
            }
        }
    }
}
