//! What the operators compute, written as plainly as possible in f64, and the proof by finite differences that the
//! gradients written here are the gradients. The CPU's operators and the GPU's are tested against it.
//!
//! `stored` is what becomes of a convolution's sum before bias, ReLU and pool see it: itself, except where a GPU writes it to memory in bf16.

use crate::backbone::Window;

/// A feature map `[channel, row, column]`.
#[derive(Debug, Clone)]
pub(crate) struct Map {
    pub(crate) channels: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) values: Vec<f64>,
}

impl Map {
    /// Where the value stands at a place that padding may have moved outside.
    fn inside(&self, channel: usize, place: [usize; 2], padding: [usize; 2]) -> Option<usize> {
        let row = place[0].checked_sub(padding[0])?;
        let column = place[1].checked_sub(padding[1])?;
        let is_inside = row < self.rows && column < self.columns;
        is_inside.then(|| (channel * self.rows + row) * self.columns + column)
    }

    fn at(&self, channel: usize, row: usize, column: usize) -> f64 {
        self.values[(channel * self.rows + row) * self.columns + column]
    }
}

/// Gradients of one image.
#[derive(Debug)]
pub(crate) struct Back {
    pub(crate) input: Vec<f64>,
    pub(crate) weight: Vec<f64>,
    pub(crate) bias: Vec<f64>,
}

/// Value and position of the first maximum of a window, before ReLU.
fn largest(
    input: &Map,
    weight: &[f64],
    bias: &[f64],
    out: usize,
    row: usize,
    column: usize,
    stored: impl Fn(f64) -> f64,
) -> (f64, usize, usize) {
    let mut best = (f64::NEG_INFINITY, 0, 0);
    for (y, x) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let (y, x) = (2 * row + y, 2 * column + x);
        let mut sum = 0.0;
        for c in 0..input.channels {
            for i in 0..3 {
                for j in 0..3 {
                    sum += weight[((out * input.channels + c) * 3 + i) * 3 + j]
                        * input.at(c, y + i, x + j);
                }
            }
        }
        let sum = stored(sum);
        if sum > best.0 {
            best = (sum, y, x);
        }
    }
    (best.0 + bias[out], best.1, best.2)
}

pub(crate) fn convolution_relu_pool(
    input: &Map,
    weight: &[f64],
    bias: &[f64],
    stored: impl Fn(f64) -> f64 + Copy,
) -> Map {
    let (rows, columns) = ((input.rows - 2) / 2, (input.columns - 2) / 2);
    let mut values = Vec::new();
    for out in 0..bias.len() {
        for row in 0..rows {
            for column in 0..columns {
                let (value, _, _) = largest(input, weight, bias, out, row, column, stored);
                values.push(value.max(0.0));
            }
        }
    }
    Map {
        channels: bias.len(),
        rows,
        columns,
        values,
    }
}

pub(crate) fn convolution_relu_pool_gradient(
    input: &Map,
    weight: &[f64],
    bias: &[f64],
    gradient: &Map,
    stored: impl Fn(f64) -> f64 + Copy,
) -> Back {
    let mut back = Back {
        input: vec![0.0; input.values.len()],
        weight: vec![0.0; weight.len()],
        bias: vec![0.0; bias.len()],
    };
    for out in 0..bias.len() {
        for row in 0..gradient.rows {
            for column in 0..gradient.columns {
                let (value, y, x) = largest(input, weight, bias, out, row, column, stored);
                if value <= 0.0 {
                    continue;
                }
                let g = gradient.at(out, row, column);
                back.bias[out] += g;
                for c in 0..input.channels {
                    for i in 0..3 {
                        for j in 0..3 {
                            let w = ((out * input.channels + c) * 3 + i) * 3 + j;
                            let v = (c * input.rows + y + i) * input.columns + x + j;
                            back.weight[w] += g * input.values[v];
                            back.input[v] += g * weight[w];
                        }
                    }
                }
            }
        }
    }
    back
}

/// Calls `f(output place, input places by tap)` for each window over a channel; places outside are `None`.
fn windows(
    input: &Map,
    channel: usize,
    window: Window,
    mut f: impl FnMut(usize, &[Option<usize>]),
) {
    let [rows, columns] = window.output([input.rows, input.columns]).unwrap();
    for row in 0..rows {
        for column in 0..columns {
            let mut under = Vec::new();
            for i in 0..window.kernel[0] {
                for j in 0..window.kernel[1] {
                    let place = [row * window.stride + i, column * window.stride + j];
                    under.push(input.inside(channel, place, window.padding));
                }
            }
            f(row * columns + column, &under);
        }
    }
}

fn output(input: &Map, channels: usize, window: Window) -> Map {
    let [rows, columns] = window.output([input.rows, input.columns]).unwrap();
    Map {
        channels,
        rows,
        columns,
        values: vec![0.0; channels * rows * columns],
    }
}

/// A convolution of any window, without bias.
pub(crate) fn convolution(input: &Map, weight: &[f64], n_out: usize, window: Window) -> Map {
    let mut map = output(input, n_out, window);
    let (area, taps) = (map.rows * map.columns, window.kernel[0] * window.kernel[1]);
    for channel in 0..input.channels {
        windows(input, channel, window, |place, under| {
            for out in 0..n_out {
                let kernel = &weight[(out * input.channels + channel) * taps..][..taps];
                let pairs = kernel.iter().zip(under);
                let products = pairs.filter_map(|(w, at)| Some(w * input.values[(*at)?]));
                map.values[out * area + place] += products.sum::<f64>();
            }
        });
    }
    map
}

/// Gradients of its input and its weight.
pub(crate) fn convolution_gradient(
    input: &Map,
    weight: &[f64],
    window: Window,
    gradient: &Map,
) -> (Vec<f64>, Vec<f64>) {
    let (area, taps) = (
        gradient.rows * gradient.columns,
        window.kernel[0] * window.kernel[1],
    );
    let mut of_input = vec![0.0; input.values.len()];
    let mut of_weight = vec![0.0; weight.len()];
    for channel in 0..input.channels {
        windows(input, channel, window, |place, under| {
            for out in 0..gradient.channels {
                let g = gradient.values[out * area + place];
                for (tap, at) in under.iter().enumerate() {
                    let w = (out * input.channels + channel) * taps + tap;
                    if let Some(at) = *at {
                        of_input[at] += g * weight[w];
                        of_weight[w] += g * input.values[at];
                    }
                }
            }
        });
    }
    (of_input, of_weight)
}

/// The first largest of a window's places.
fn first_largest(input: &Map, under: &[Option<usize>]) -> usize {
    let mut inside = under.iter().flatten().copied();
    let first = inside.next().unwrap();
    inside.fold(first, |best, at| {
        if input.values[at] > input.values[best] {
            at
        } else {
            best
        }
    })
}

/// The largest value of each window, or the mean of its places, those outside counted as zeros.
pub(crate) fn pool(input: &Map, window: Window, is_mean: bool) -> Map {
    let mut map = output(input, input.channels, window);
    let area = map.rows * map.columns;
    for channel in 0..input.channels {
        windows(input, channel, window, |place, under| {
            map.values[channel * area + place] = if is_mean {
                let inside = under.iter().flatten().map(|at| input.values[*at]);
                inside.sum::<f64>() / under.len() as f64
            } else {
                input.values[first_largest(input, under)]
            };
        });
    }
    map
}

/// The gradient of what a pool reads.
pub(crate) fn pool_gradient(
    input: &Map,
    window: Window,
    is_mean: bool,
    gradient: &Map,
) -> Vec<f64> {
    let area = gradient.rows * gradient.columns;
    let mut of_input = vec![0.0; input.values.len()];
    for channel in 0..input.channels {
        windows(input, channel, window, |place, under| {
            let g = gradient.values[channel * area + place];
            if is_mean {
                for at in under.iter().flatten() {
                    of_input[*at] += g / under.len() as f64;
                }
            } else {
                of_input[first_largest(input, under)] += g;
            }
        });
    }
    of_input
}

mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn written_gradients_are_the_finite_differences() {
        let mut random = Random::new(5, 0);
        let mut draw = |n: usize| (0..n).map(|_| random.uniform() - 0.5).collect::<Vec<f64>>();
        // 9 x 8: the convolution has an odd number of rows, the last of which pooling drops.
        let input = Map {
            channels: 2,
            rows: 9,
            columns: 8,
            values: draw(2 * 9 * 8),
        };
        let (weight, bias) = (draw(3 * 2 * 9), draw(3));
        let gradient = Map {
            channels: 3,
            rows: 3,
            columns: 3,
            values: draw(27),
        };
        let objective = |input: &Map, weight: &[f64], bias: &[f64]| -> f64 {
            let pooled = convolution_relu_pool(input, weight, bias, |sum| sum);
            pooled
                .values
                .iter()
                .zip(&gradient.values)
                .map(|(a, b)| a * b)
                .sum()
        };
        let back = convolution_relu_pool_gradient(&input, &weight, &bias, &gradient, |sum| sum);
        let step = 1e-6;
        let check = |expected: f64, plus: f64, minus: f64| {
            assert!(
                ((plus - minus) / (2.0 * step) - expected).abs() < 1e-7,
                "{expected}"
            );
        };
        for (index, &expected) in back.input.iter().enumerate() {
            let [plus, minus] = [step, -step].map(|step| {
                let mut moved = input.clone();
                moved.values[index] += step;
                objective(&moved, &weight, &bias)
            });
            check(expected, plus, minus);
        }
        for (index, &expected) in back.weight.iter().enumerate() {
            let [plus, minus] = [step, -step].map(|step| {
                let mut moved = weight.clone();
                moved[index] += step;
                objective(&input, &moved, &bias)
            });
            check(expected, plus, minus);
        }
        for (index, &expected) in back.bias.iter().enumerate() {
            let [plus, minus] = [step, -step].map(|step| {
                let mut moved = bias.clone();
                moved[index] += step;
                objective(&input, &weight, &moved)
            });
            check(expected, plus, minus);
        }
    }
}
