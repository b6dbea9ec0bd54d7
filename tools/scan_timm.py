"""Load every pretrained tag of timm's plain-ViT modules into our model and write how much the two differ.

    python tools/scan_timm.py                                 every tag, into nbs/05_pretrained_timm.csv
    python tools/scan_timm.py --only 'dino' --to /tmp/d.csv   the tags that a regular expression finds

No weights are downloaded. Of each tag, timm builds a model of one block with its own widths, heads and all else, every
parameter gets random numbers, and the model is saved as timm saves it for the hub: weights with a config.json beside
them. `load_pretrained` loads that folder. Tokens and logits of both models are compared in float64: at the tag's own
resolution, if this is at most 260 patches and the model at most 1,280 wide, and at 3 x 5 patches. Tags of one
architecture that differ in nothing but their weights are compared once.

The columns: `tag` and `module` are timm's names; `result` is "exact" (the largest difference is below 1e-7 of the
largest number), "wrong", or "refused" (`load_pretrained` says that our model can't compute this variant);
`difference` is that largest difference; `reason` is what the refusal says that the variant has.
"""
import argparse, csv, io, json, re, sys, tempfile, warnings
from contextlib import redirect_stdout
from pathlib import Path

import timm, torch
from timm.models._hub import save_for_hf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # this checkout's library, wherever another is installed
from vit_nbdev.pretrained import _facts, load_pretrained

TABLE = ROOT/'nbs'/'05_pretrained_timm.csv'
COLUMNS = ('tag', 'module', 'result', 'difference', 'reason')
MODULES = ('vision_transformer', 'deit', 'beit', 'eva', 'vision_transformer_hybrid', 'vision_transformer_relpos',
           'vision_transformer_sam', 'naflexvit', 'cait')
EXACT = 1e-7                            # DeiT's two heads are joined in float32: not better than 2e-8
MAX_PATCHES, MAX_WIDTH = 260, 1280      # beyond these, only 3 x 5 patches are compared

def published(modules=MODULES):
    "`{tag: module}` of all that timm publishes in these modules"
    return {tag: module for module in modules for tag in timm.list_models(module=module, pretrained=True)}

def randomise(model):
    "Random numbers in every parameter, of a size that keeps the signal alive; buffers (sines, cosines) stay"
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.empty(p.shape).normal_(generator=g)
            if p.dim() > 1 and p.shape[0] != 1: p.copy_(noise*(0.6/max(p[:1].numel(), 1)**0.5))
            else: p.copy_(0.3*noise + float(p.dim() == 1 and p.mean() > 0.9))      # weights of norms stay about 1
    return model.eval()

def quiet(folder, **changes):
    "`load_pretrained` without its report"
    with redirect_stdout(io.StringIO()): return load_pretrained(folder, **changes)

def relative(got, ref):
    "Largest difference over the largest number"
    return ((got - ref).abs().max()/ref.abs().max()).item()

def check_name(tag, folder):
    "Raise the error of a variant that its configuration alone gives away: the model need not be built"
    config = timm.models.get_pretrained_cfg(tag)
    content = dict(architecture=tag.split('.')[0], num_classes=config.num_classes, pretrained_cfg=config.to_dict())
    (folder/'config.json').write_text(json.dumps(content, default=str), encoding='utf-8')
    _facts(folder)

def compare(theirs, ours, size, whole, seed):
    "The larger of the differences of tokens and logits; what timm's image (`whole`) has beyond `size` is black"
    g = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, *whole, dtype=torch.float64)
    image[:, :, :size[0], :size[1]] = torch.randn(1, 3, *size, dtype=torch.float64, generator=g)
    theirs, ours = theirs.double(), ours.double()
    if getattr(theirs, 'rope', None) is not None: theirs.rope.float()      # as in a model that was never converted
    with torch.no_grad():
        tokens = theirs.forward_features(image)
        logits = theirs.forward_head(tokens)
        image = image[:, :, :size[0], :size[1]]
        differences = relative(ours.forward_features(image), tokens), relative(ours(image), logits)
    theirs.float()
    return max(differences)

def largest_difference(tag, folder):
    "Of our model and timm's at both resolutions; `ValueError` where ours refuses the variant"
    theirs = randomise(timm.create_model(tag, pretrained=False, depth=1))
    save_for_hf(theirs, str(folder), safe_serialization=True)
    ours = quiet(folder)
    config, found = ours.config, []
    if config.n_patches <= MAX_PATCHES and config.dim <= MAX_WIDTH:
        whole = tuple(theirs.patch_embed.img_size) if hasattr(theirs, 'patch_embed') else config._sides
        found.append(compare(theirs, ours, config._sides, whole, seed=1))
    size = (3*config.patch_size, 5*config.patch_size)
    if hasattr(theirs, 'set_input_size'): theirs.set_input_size(img_size=size)       # NaFlex takes any
    found.append(compare(theirs, quiet(folder, img_size=size), size, size, seed=2))
    return max(found)

def scan(tag):
    "`result`, `difference` and `reason` of one tag"
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_name(tag, Path(folder))
            difference = largest_difference(tag, Path(folder))
        except ValueError as e:
            reason = re.search(r'this variant of ViT has (.*?) \(', str(e))
            if reason is None: raise      # no refusal: a fault of ours, or of this script
            return dict(result='refused', difference='', reason=reason[1])
    return dict(result='exact' if difference < EXACT else 'wrong', difference=f'{difference:.1e}', reason='')

def kind(tag):
    "What tags share that give the same model here"
    config = timm.models.get_pretrained_cfg(tag)
    return tag.split('.')[0], config.input_size, config.num_classes, config.pool_size

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', metavar='REGEX', help='scan only the tags in which this is found; needs --to')
    parser.add_argument('--to', metavar='CSV', type=Path, help=f'the file to write; default: nbs/{TABLE.name}')
    args = parser.parse_args()
    if args.only and not args.to: parser.error("--only scans a part of the tags: say with --to where it goes")
    warnings.filterwarnings('ignore')
    tags = {tag: module for tag, module in published().items() if not args.only or re.search(args.only, tag)}
    rows, known = [], {}
    for tag, module in tags.items():
        if kind(tag) not in known: known[kind(tag)] = scan(tag)
        row = dict(tag=tag, module=module) | known[kind(tag)]
        print(*[row[name] for name in COLUMNS if row[name]], file=sys.stderr, flush=True)
        rows.append(row)
    with open(args.to or TABLE, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

if __name__ == '__main__': main()
