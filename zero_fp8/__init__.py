"""Who owns which bytes, and when they travel.

A gradient's way: hook -> bucket -> messages -> exchange -> reduced gradient.

    gradients.reducer -> gradients.packing -> gradients.exchange -> gradients.reduced

A weight's way: shard -> sweep -> gather -> parameter.

    step -> states.shard -> weights.store -> weights.views

`wiring` builds the parts of both ways and is the only place that chooses between them; `placement` says who
owns what; `handlers` answers DeepSpeed's engine; `checkpoint` writes and reads the states; `optimizer` holds
the hyperparameters, and is FP8AdamW without DeepSpeed.

One meaning per word:

    parameter          a tensor of the model that is trained; its index is its place among all of the model's
    fleet              the ranks that hold the same copy of a parameter and share its states
    bucket             parameters whose gradients travel together: of one dtype, param group and fleet
    slot               a parameter's place in a bucket
    block              consecutive elements of one parameter; what has a scale
    row                a block in a two-dimensional tensor of codes, of states or of weights
    piece              the blocks of one parameter that one rank owns
    owner              the rank that adds up a block's gradients and keeps its states
    shard              an owner's Adam states of a bucket
    reduced gradient   an owner's sum of a bucket's gradients, over ranks and rounds
    round              the exchange of every bucket once, in one backward
    late gradient      one that came after its bucket had left, or in a backward that exchanges nothing
    message            what one rank sends to one owner of a bucket: codes, then scales
    hop                a message's travel inside a node, or between nodes
    node, place        ranks with a fast link between them, and a rank's number among them
    exchange           a bucket's messages under way, in one hop or two
    sweep              one pass over a shard: gradient and states in, states and weights out
    gather             every owner's weights of a bucket, on their way to all ranks
    verdict            norm, clip factor and whether to step, the same on every rank
    settle             count a step or a skip, once the host knows the verdict
    lend               give access to states for as long as a `with` lasts, wherever they live

Invariants, each with a test: integers decide who owns what (`placement`); a block is the same bytes wherever
it lives; a value goes one way; axes are fields that `wiring` composes, not subclasses; the device decides
whether to step and the host reads it last.
"""
