"""SMCA-DETR as an executable specification: what the model computes, in NumPy, in float64, and nothing else.

Correct, complete and readable come before fast here. Nothing in this package knows PyTorch; the production model in
`smca.gpu` is held to these functions, number by number, by the tests. Read it in this order (some four hours):

     1. arrays             the three array types and the one way in which a wrong shape is reported
     2. gaussian           the prior: a Gaussian per query, as the paper's weight map and as its logarithm
     3. attention_forward  the method itself: the prior in the attention logits, over one level and over several
     4. attention_backward its gradients, written out
     5. attention          all of these under one name
     6. layers             linear, layer norm, multi-head attention, convolution: what everybody knows, kept short
     7. position           which cells hold the image, and the sine encoding of where they are
     8. config             what the model reads of its configuration
     9. encoder_conv       how cells mix by convolution: the authors' later encoder, and one besides
    10. encoder            how cells learn of each other, within their level and across levels
    11. prior              centre and precision of a query's Gaussians, from its state
    12. decoder            where the queries meet the image: reference centre, level weights, box refinement
    13. dense_head         beyond the paper: cells that classify and regress, and become queries
    14. softmax_scores     DETR's own scores: a softmax with "no object", and its loss
    15. parameters         every parameter's name and shape
    16. model              from backbone features to class logits and boxes
    17. boxes              box formats, IoU and generalised IoU
    18. matching           what a match costs, and the assignment with the least cost, written out
    19. losses             the set loss over all decoder layers
    20. dense_loss         beyond the paper: which object owns which cell, and the loss of the cells
    21. denoising          beyond the paper: noised objects as queries in training, and their loss
    22. losses_backward    the gradient of the set loss, written out
    23. small_detector     a detector whose whole gradient fits on a page, to specify training on
    24. optimizers         what moves the parameters: clipping, AdamW, Muon, the average of the weights
    25. training_step      what happens around the model: processes, accumulation, groups of parameters
    26. training_run       several steps, and a checkpoint between them

Published is SMCA; what goes beyond the paper is an option of the same model, off unless asked for (`config`), and what
it is worth is measured in `docs/convergence.md`.

`docs/tour.md` is the guided version. "method.md" in a docstring is `docs/method.md`; "paper" is arXiv 2101.07448,
"Fast Convergence of DETR with Spatially Modulated Co-Attention" (cited by the heading of the passage), and "DETR" is
arXiv 2005.12872.

A number names the file of its equation: (1) to (3) gaussian, (4) to (15) attention, (L1) layers, (P1) position,
(C1) encoder_conv, (E1) encoder, (D1) decoder and prior, (H1) dense_head, (K1) softmax_scores, (M1) model, (B1) boxes, (A1)
matching, the assignment, (S1) losses, the set loss, (T1) dense_loss, (N1) denoising, (G1) losses_backward, (Q1)
small_detector, (O1) optimizers and (R1) training_step.

Shape letters: B images, N queries, h heads, d channels per head, C = h·d, K classes, M decoder layers, T targets
(padded), F hidden channels of a feed-forward network, J feature levels, finest first. A map has H × W cells and
L = H·W keys, row-major (index = row·W + column). The cell in column i and row j has its centre at (i + ½, j + ½). A
`size` is (height, width); a point is (x, y).
"""

SPECIFICATION_VERSION = "1.0"
"""Of the numbers that this package gives: the first part changes where one of them does, the second where something is added."""
