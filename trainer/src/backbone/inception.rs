//! Inception-v3 (Szegedy et al. 2016), torchvision's `inception_v3` without its auxiliary classifier: a table of cells.

use super::{Backbone, Draft, Layer, Source, Window, square};
use crate::architecture::scaled_units;

/// One step of a cell: where from, what, how many channels. `IN` is the cell's input.
#[derive(Clone, Copy)]
struct Step {
    name: &'static str,
    from: &'static str,
    kind: Kind,
    units: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Convolution(Window),
    Max(Window),
    Average(Window),
}

const IN: &str = "";
/// In place of a number of channels: the cell's own number.
const OWN: usize = 0;

/// A convolution that keeps rows and columns.
const fn same(name: &'static str, from: &'static str, units: usize, kernel: [usize; 2]) -> Step {
    let padding = [kernel[0] / 2, kernel[1] / 2];
    let window = Window {
        kernel,
        stride: 1,
        padding,
    };
    Step {
        name,
        from,
        kind: Kind::Convolution(window),
        units,
    }
}

/// A 3x3 convolution without padding.
const fn valid(name: &'static str, from: &'static str, units: usize, stride: usize) -> Step {
    Step {
        name,
        from,
        kind: Kind::Convolution(square(3, stride, 0)),
        units,
    }
}

const fn largest(name: &'static str, from: &'static str) -> Step {
    Step {
        name,
        from,
        kind: Kind::Max(square(3, 2, 0)),
        units: OWN,
    }
}

const fn mean(name: &'static str) -> Step {
    Step {
        name,
        from: IN,
        kind: Kind::Average(square(3, 1, 1)),
        units: OWN,
    }
}

/// A cell: its steps, and those whose outputs are put together; none: the last step's output.
struct Cell {
    steps: &'static [Step],
    outputs: &'static [&'static str],
}

const STEM: Cell = Cell {
    steps: &[
        valid("Conv2d_1a_3x3", IN, 32, 2),
        valid("Conv2d_2a_3x3", "Conv2d_1a_3x3", 32, 1),
        same("Conv2d_2b_3x3", "Conv2d_2a_3x3", 64, [3, 3]),
        largest("maxpool1", "Conv2d_2b_3x3"),
        same("Conv2d_3b_1x1", "maxpool1", 80, [1, 1]),
        valid("Conv2d_4a_3x3", "Conv2d_3b_1x1", 192, 1),
        largest("maxpool2", "Conv2d_4a_3x3"),
    ],
    outputs: &[],
};

const CELL_A: Cell = Cell {
    steps: &[
        same("branch1x1", IN, 64, [1, 1]),
        same("branch5x5_1", IN, 48, [1, 1]),
        same("branch5x5_2", "branch5x5_1", 64, [5, 5]),
        same("branch3x3dbl_1", IN, 64, [1, 1]),
        same("branch3x3dbl_2", "branch3x3dbl_1", 96, [3, 3]),
        same("branch3x3dbl_3", "branch3x3dbl_2", 96, [3, 3]),
        mean("pool"),
        same("branch_pool", "pool", OWN, [1, 1]),
    ],
    outputs: &["branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"],
};

const CELL_B: Cell = Cell {
    steps: &[
        valid("branch3x3", IN, 384, 2),
        same("branch3x3dbl_1", IN, 64, [1, 1]),
        same("branch3x3dbl_2", "branch3x3dbl_1", 96, [3, 3]),
        valid("branch3x3dbl_3", "branch3x3dbl_2", 96, 2),
        largest("pool", IN),
    ],
    outputs: &["branch3x3", "branch3x3dbl_3", "pool"],
};

const CELL_C: Cell = Cell {
    steps: &[
        same("branch1x1", IN, 192, [1, 1]),
        same("branch7x7_1", IN, OWN, [1, 1]),
        same("branch7x7_2", "branch7x7_1", OWN, [1, 7]),
        same("branch7x7_3", "branch7x7_2", 192, [7, 1]),
        same("branch7x7dbl_1", IN, OWN, [1, 1]),
        same("branch7x7dbl_2", "branch7x7dbl_1", OWN, [7, 1]),
        same("branch7x7dbl_3", "branch7x7dbl_2", OWN, [1, 7]),
        same("branch7x7dbl_4", "branch7x7dbl_3", OWN, [7, 1]),
        same("branch7x7dbl_5", "branch7x7dbl_4", 192, [1, 7]),
        mean("pool"),
        same("branch_pool", "pool", 192, [1, 1]),
    ],
    outputs: &["branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"],
};

const CELL_D: Cell = Cell {
    steps: &[
        same("branch3x3_1", IN, 192, [1, 1]),
        valid("branch3x3_2", "branch3x3_1", 320, 2),
        same("branch7x7x3_1", IN, 192, [1, 1]),
        same("branch7x7x3_2", "branch7x7x3_1", 192, [1, 7]),
        same("branch7x7x3_3", "branch7x7x3_2", 192, [7, 1]),
        valid("branch7x7x3_4", "branch7x7x3_3", 192, 2),
        largest("pool", IN),
    ],
    outputs: &["branch3x3_2", "branch7x7x3_4", "pool"],
};

const CELL_E: Cell = Cell {
    steps: &[
        same("branch1x1", IN, 320, [1, 1]),
        same("branch3x3_1", IN, 384, [1, 1]),
        same("branch3x3_2a", "branch3x3_1", 384, [1, 3]),
        same("branch3x3_2b", "branch3x3_1", 384, [3, 1]),
        same("branch3x3dbl_1", IN, 448, [1, 1]),
        same("branch3x3dbl_2", "branch3x3dbl_1", 384, [3, 3]),
        same("branch3x3dbl_3a", "branch3x3dbl_2", 384, [1, 3]),
        same("branch3x3dbl_3b", "branch3x3dbl_2", 384, [3, 1]),
        mean("pool"),
        same("branch_pool", "pool", 192, [1, 1]),
    ],
    outputs: &[
        "branch1x1",
        "branch3x3_2a",
        "branch3x3_2b",
        "branch3x3dbl_3a",
        "branch3x3dbl_3b",
        "branch_pool",
    ],
};

/// The cells behind the stem, each with its own number of channels.
const INCEPTION_V3: [(&str, &Cell, usize); 11] = [
    ("Mixed_5b", &CELL_A, 32),
    ("Mixed_5c", &CELL_A, 64),
    ("Mixed_5d", &CELL_A, 64),
    ("Mixed_6a", &CELL_B, OWN),
    ("Mixed_6b", &CELL_C, 128),
    ("Mixed_6c", &CELL_C, 160),
    ("Mixed_6d", &CELL_C, 160),
    ("Mixed_6e", &CELL_C, 192),
    ("Mixed_7a", &CELL_D, OWN),
    ("Mixed_7b", &CELL_E, OWN),
    ("Mixed_7c", &CELL_E, OWN),
];

impl Draft {
    /// Adds a cell; its steps' names begin with `prefix`.
    fn cell(&mut self, prefix: &str, cell: &Cell, own: usize, input: Source) -> Source {
        let mut known = vec![(IN, input)];
        let find = |known: &[(&str, Source)], name: &str| {
            let found = known.iter().find(|(step, _)| *step == name);
            found.map_or(input, |&(_, source)| source)
        };
        for step in cell.steps {
            let from = find(&known, step.from);
            let name = format!("{prefix}{}", step.name);
            let source = match step.kind {
                Kind::Convolution(window) => {
                    let units = if step.units == OWN { own } else { step.units };
                    let layer = Layer::Convolution {
                        kernel_name: format!("{name}.conv"),
                        norm_name: format!("{name}.bn"),
                        window,
                        has_relu: true,
                    };
                    let units = scaled_units(units, self.width);
                    self.push(&name, layer, vec![from], units)
                }
                Kind::Max(window) => self.pool(&name, Layer::MaxPool(window), from),
                Kind::Average(window) => self.pool(&name, Layer::AveragePool(window), from),
            };
            known.push((step.name, source));
        }
        if cell.outputs.is_empty() {
            return known.last().map_or(input, |&(_, source)| source);
        }
        let outputs = cell.outputs.iter().map(|name| find(&known, name)).collect();
        self.concat(prefix.trim_end_matches('.'), outputs)
    }
}

/// torchvision feeds the network it publishes with (x - 0.5) / 0.5, whatever its input's own normalisation (`transform_input`).
pub(super) fn inception_v3(width: f64) -> Backbone {
    let mut draft = Draft {
        width,
        nodes: Vec::new(),
    };
    let mut last = draft.cell("", &STEM, OWN, Source::Image);
    for (name, cell, own) in INCEPTION_V3 {
        last = draft.cell(&format!("{name}."), cell, own, last);
    }
    draft.finish(last, ([0.5; 3], [0.5; 3]), 1e-3, "inception_v3")
}
