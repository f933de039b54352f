"""What mends an error, in the options of the command line."""

from mono_quant.errors import Mend

OPTIONS = {
    Mend.SAMPLES: "say how many with --samples N",
    Mend.FORWARD: "if it is called another way, say how with --forward package.module:callable, "
    "a function of (model, batch)",
    Mend.OUTPUT: "return one with --forward package.module:callable, a function of (model, batch)",
    Mend.BATCH: "leave it out of the file of data",
    Mend.TUPLE: "save a list to the file of data: [(inputs, labels)] for one batch, or one of "
    "several batches",
    Mend.DATA: "give some with --calibration FILE",
    Mend.DATA_OR_DYNAMIC: "give some with --calibration FILE, or say --activations dynamic",
    Mend.NO_STATIC: "leave --activations static out; of a bare checkpoint, name its model with "
    "--factory package.module:callable",
    Mend.COPY: "leave --in-place out",
    Mend.ROUNDING: "leave it out with --skip {layer}, or give it another rounding with "
    "--override PATTERN:rounding=KIND",
    Mend.SKIP: "mend the weight, or leave the layer in float with --skip {layer}",
}
