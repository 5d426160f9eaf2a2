"""SMCA-DETR as an executable specification: what the model computes, in NumPy, in float64, and nothing else.

Correct, complete and readable come before fast here. Nothing in this package knows PyTorch; the production model in
`smca.gpu` is held to these functions, number by number, by the tests. Read it in this order (about an hour):

    1. arrays      the three array types and the one way in which a wrong shape is reported
    2. attention   the method itself: a Gaussian per query, added to the attention logits; forward and backward
    3. layers      linear, layer norm, multi-head attention, the encoder layer: what everybody knows, kept short
    4. position    the sine position encoding, in coordinates of the unpadded image
    5. config      what the model reads of its configuration
    6. decoder     where the queries meet the image: centre, offset and scale heads, box refinement
    7. model       from backbone features to class logits and boxes; every parameter's name and shape
    8. boxes       box formats, IoU and generalised IoU
    9. matching    what a match costs, and the assignment with the least cost, written out
    10. losses     the set loss over all decoder layers

`docs/tour.md` is the guided version. "method.md" in a docstring is `docs/method.md`; "paper" is arXiv 2101.07448,
"Fast Convergence of DETR with Spatially Modulated Co-Attention" (cited by the heading of the passage), and "DETR" is
arXiv 2005.12872.

Shape letters: B images, N queries, h heads, d channels a head, C = h·d, K classes, M decoder layers, T targets
(padded), F hidden channels of a feed-forward network. A map has H × W cells and L = H·W keys, row-major
(index = row·W + column). The cell in column i and row j has its centre at (i + ½, j + ½). A `size` is
(height, width); a point is (x, y).
"""
