"""Figures that papers and their authors published: tables, profiles, and what a planner prints."""

import itertools

# -------------------------------------------------------------------------------- zero bubble

# Zero Bubble, Table 5. Times in ms: forward, I, W, sending; bubble rates. GPUs p, microbatches m,
# layers. The last three columns are of Table 4: samples per GPU per second, measured.
TABLE_5 = """\
model  p   m  layers   T_F    T_B     T_W  T_comm   1F1B 1F1B-I ZB-H1  ZB-H2 1F1B/s 1F1B-I/s ZB-1p/s
1.5B   8  24  24     18.522 18.086  9.337  0.601   .2431 .1055  .1585  .1083  11.8   13.1     12.9
1.5B   8  32  24     18.513 18.086  9.331  0.626   .1985 .0818  .1242  .0837  12.5   13.4     13.4
1.5B   8  64  24     18.546 18.097  9.321  0.762   .1240 .0443  .0674  .0444  13.6   13.9     14.2
6.2B   8  24  32     29.718 29.444 19.927  0.527   .2347 .0808  .1323  .0698  3.50   4.01     3.88
6.2B   8  32  32     29.802 29.428 19.530  0.577   .1898 .0628  .1045  .0559  3.70   4.08     4.00
6.2B   8  64  32     29.935 29.621 19.388  0.535   .1091 .0320  .0554  .0294  4.03   4.19     4.20
14.6B 16  48  48     11.347 11.248  8.132  0.377   .2552 .1104  .1397  .0672  1.40   1.54     1.61
14.6B 16  64  48     11.307 11.254  8.101  0.379   .2082 .0852  .1088  .0516  1.49   1.59     1.67
14.6B 16 128  48     11.325 11.308  8.109  0.378   .1251 .0445  .0576  .0266  1.64   1.66     1.76
28.3B 32  96  64     10.419 10.207  7.715  0.408   .2646 .1493  .1421  .0641  .76    .82      .87
28.3B 32 128  64     10.408 10.204  7.703  0.408   .2168 .1164  .1106  .0490  .80    .85      .90
28.3B 32 256  64     10.402 10.248  7.698  0.460   .1352 .0624  .0594  .0257  .88    .90      .96"""

# ---------------------------------------------------------------------------------- profiles
#
# Figures of profiler/*/profiles/*/graph.txt in the authors' repository, msr-fiddle/pipedream (MIT
# licence): node 1, node 2, ... Each node: kind, forward ms, backward ms, bytes of its output (or a
# list), bytes of its weights. vgg16 and alexnet feed each node into the next, and one shortcut.

VGG16 = """\
Input 17.972 0 77070336 0 | Conv2d 22.307 24.613 1644167168 7168 | ReLU 4.446 5.553 1644167168 0 |
Conv2d 46.201 113.330 1644167168 147712 | ReLU 4.455 5.311 1644167168 0 |
MaxPool2d 3.795 5.579 411041792 0 | Conv2d 15.155 39.648 822083584 295424 |
ReLU 2.359 2.738 822083584 0 | Conv2d 22.062 53.379 822083584 590336 |
ReLU 2.513 2.620 822083584 0 | MaxPool2d 2.211 2.788 205520896 0 |
Conv2d 10.814 18.335 411041792 1180672 | ReLU 1.377 1.380 411041792 0 |
Conv2d 17.458 27.023 411041792 2360320 | ReLU 1.640 1.463 411041792 0 |
Conv2d 14.245 33.888 411041792 2360320 | ReLU 1.549 1.321 411041792 0 |
MaxPool2d 1.169 1.513 102760448 0 | Conv2d 9.249 14.574 205520896 4720640 |
ReLU 1.026 0.696 205520896 0 | Conv2d 15.359 21.900 205520896 9439232 |
ReLU 0.848 0.679 205520896 0 | Conv2d 11.775 28.670 205520896 9439232 |
ReLU 0.881 0.642 205520896 0 | MaxPool2d 0.802 0.781 51380224 0 |
Conv2d 5.608 7.381 51380224 9439232 | ReLU 0.784 0.266 51380224 0 |
Conv2d 4.070 7.396 51380224 9439232 | ReLU 0.463 0.190 51380224 0 |
Conv2d 4.042 8.648 51380224 9439232 | ReLU 0.455 0.175 51380224 0 |
MaxPool2d 0.553 0.234 12845056 0 | Size 0 0 4 0 | View 0 0 12845056 0 |
Linear 2.475 4.575 2097152 411058176 | ReLU 0.377 0.030 2097152 0 | Dropout 0 0 2097152 0 |
Linear 0.709 0.734 2097152 67125248 | ReLU 0.277 0.032 2097152 0 | Dropout 0 0 2097152 0 |
Linear 0.393 0.548 512000 16388000
"""
ALEXNET = """\
Input 635.902 0 154140672 0 | Conv2d 22.316 6.405 198246400 93184 | ReLU 0.813 0.733 198246400 0 |
MaxPool2d 0.756 1.148 47775744 0 | Conv2d 3.128 5.612 143327232 1229568 |
ReLU 0.811 0.524 143327232 0 | MaxPool2d 0.579 0.861 33226752 0 |
Conv2d 3.260 6.610 66453504 2655744 | ReLU 0.427 0.269 66453504 0 |
Conv2d 4.423 7.197 44302336 3539968 | ReLU 0.539 0.188 44302336 0 |
Conv2d 2.815 5.497 44302336 2360320 | ReLU 0.524 0.176 44302336 0 |
MaxPool2d 0.391 0.306 9437184 0 | Size 0 0 4 0 | View 0 0 9437184 0 | Dropout 0 0 9437184 0 |
Linear 1.737 3.072 4194304 151011328 | ReLU 0.471 0.039 4194304 0 | Dropout 0 0 4194304 0 |
Linear 1.075 1.366 4194304 67125248 | ReLU 0.283 0.043 4194304 0 |
Linear 0.453 0.474 1024000 16388000
"""
GNMT = """\
Input0 0 0 0 0 | Input1 0 0 0 0 | Input2 0 0 0 0 | Embedding 0.073 6.949 6291456 132382720 |
EmuBidirLSTM 5.247 0.016 12582912 67174400 | Dropout 0.077 0.196 12582912 0 |
LSTM 3.190 5.348 [6291456;131072;131072] 50364416 | getitem 0 0 6291456 0 |
getitem 0 0 131072 0 | Dropout 0.064 0.128 6291456 0 |
LSTM 2.491 4.203 [6291456;131072;131072] 33587200 | getitem 0 0 6291456 0 |
getitem 0 0 131072 0 | Add 0 0 6291456 0 | Dropout 0.059 0.121 6291456 0 |
LSTM 2.492 4.201 [6291456;131072;131072] 33587200 | getitem 0 0 6291456 0 |
getitem 0 0 131072 0 | Add 0 0 6291456 0 | hidden 0 0 0 0 |
Embedding 0.066 0.328 6291456 132382720 | getitem 0 0 0 0 |
RecurrentAttention 4.546 6.141 [6160384;131072;131072;6160384;288768] 41979904 |
getitem 0 0 6160384 0 | getitem 0 0 131072 0 | getitem 0 0 131072 0 |
getitem 0 0 6160384 0 | Dropout 0.058 0.176 6160384 0 | Concat 0 0 6160384 0 |
getitem 0 0 0 0 | LSTM 3.151 5.288 [6160384;131072;131072] 50364416 |
getitem 0 0 6160384 0 | getitem 0 0 131072 0 | Dropout 0.061 0.174 6160384 0 |
Concat 0 0 6160384 0 | getitem 0 0 0 0 | LSTM 3.145 5.306 [6160384;131072;131072] 50364416 |
getitem 0 0 6160384 0 | getitem 0 0 131072 0 | Add 0 0 6160384 0 |
Dropout 0.055 0.198 6160384 0 | Concat 0 0 6160384 0 | getitem 0 0 0 0 |
LSTM 3.149 15.883 [6160384;131072;131072] 50364416 | getitem 0 0 6160384 0 |
getitem 0 0 131072 0 | Add 0 0 6160384 0 | Classifier 5.609 1.227 194437120 132512000
"""
GNMT_PATHS = """\
1-4-5-6-7-8-10-11-12-14-15-16-17-19-23-24-28-29-31-32-34-35-37-38-40-41-42-44-45-47-48 2-5 7-9
11-13 8-14-19 16-18 3-21-23-25 20-22-23-26-29 2-23-27 20-30-31-33 26-35 20-36-37-39 32-40-47 26-42
20-43-44-46"""

NODE = (
    "node{} -- {}(inplace) -- forward_compute_time={}, backward_compute_time={}, "
    "activation_size={}, parameter_size={}"
)


def graph(nodes, paths):
    """A profile as PipeDream's profiler writes it. A path feeds each of its nodes into the next."""
    lines = [NODE.format(n, *node.split()) for n, node in enumerate(nodes.split("|"), start=1)]
    edges = (edge for path in paths for edge in itertools.pairwise(path))
    lines = [*lines[::-1], *(f"\tnode{a} -- node{b}" for a, b in edges)]  # in any order
    return "\n".join(lines).replace(";", "; ")


def row(nodes, *shortcuts):
    return graph(nodes, [range(1, nodes.count("|") + 2), *shortcuts])


PROFILES = {
    "vgg16": row(VGG16, (32, 34)),
    "alexnet": row(ALEXNET, (14, 16)),
    "gnmt": graph(GNMT, [path.split("-") for path in GNMT_PATHS.split()]),
}

# What optimizer/optimizer_graph_hierarchical.py in that repository prints with
# --activation_compression_ratio 1, and -s for straight: GPUs, bytes/s, speed-up over one GPU, data
# parallelism's, plan, seconds of the slowest stage, and the layers at which it cuts.
PUBLISHED = [
    ("vgg16", 4, 1e9, False, "3.27", "1.15", "3-1", "0.205520896", [17]),
    ("vgg16", 8, 1e9, False, "6.48", "2.06", "7-1", "0.103833170", [24]),
    ("vgg16", 16, 3.125e9, False, "14.77", "8.05", "15-1", "0.045524808", [25]),
    ("vgg16", 4, 1e9, True, "1.64", "1.15", "1-1-1-1", None, None),
    ("alexnet", 4, 1e9, False, "2.49", "0.42", "3-1", "0.034217141", [16]),
    ("alexnet", 16, 1.25e9, False, "5.65", "1.67", "15-1", "0.015099494", [16]),
    ("gnmt", 4, 1e9, False, "3.46", "0.15", "1-1-1-1", "0.025868000", None),
]
