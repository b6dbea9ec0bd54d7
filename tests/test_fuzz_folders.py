"""Random small data sets: either the counts add up and every picture has its class, or one sentence refuses."""
import os, shutil, tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_nbdev.data import describe, fact_lines, folder_dls

CLASSES = ['cat', 'dog', 'Cat', 'x y', '猫', '$5', 'a.b', '__MACOSX', 'n'*120]
ODD = ['train', 'Training', 'TEST', 'test', 'val', 'valid', 'dev', 'train_set', '.hidden', *CLASSES]
FORMATS = {'.png': 'PNG', '.JPG': 'JPEG', '.webp': 'WEBP', '.tif': 'TIFF', '.bmp': 'BMP', '.gif': 'GIF', '.ppm': 'PPM',
           '.jpg_large': 'JPEG', '': 'PNG', '.2024': 'TIFF'}
OTHERS = ['notes.txt', 'labels.csv', 'README', 'Thumbs.db', 'video.mp4', 'x.npy']
DAMAGED = {'empty.png': b'', 'text.jpg': b'no image', 'noise.webp': bytes(range(256)), 'cut.gif': b'GIF89a\x08',
           'phone.heic': b'....ftypheic', 'drawing.svg': b'<svg/>'}
LINKS = {'circle': '.', 'gone': 'nowhere', 'proc': '/proc', 'zero': '/dev/zero', 'pipe': None}

def grey(kind, size, shade):
    "A picture of one shade, as a file of that kind holds it"
    im, deep = Image.new('L', size, shade), np.full(size[::-1], shade)
    return {'colour': lambda: im.convert('RGB'), 'alpha': lambda: im.convert('RGBA'),
            'cmyk': lambda: im.convert('CMYK'), 'palette': lambda: im.quantize(4),
            '16 bits': lambda: Image.fromarray((deep*257).astype(np.uint16)),
            'integers': lambda: Image.fromarray((deep*257).astype(np.int32)),
            'floats': lambda: Image.fromarray((deep/255).astype(np.float32)), '8 bits': lambda: im}[kind]()

KINDS = ['8 bits', 'colour', 'alpha', 'cmyk', 'palette', '16 bits', 'integers', 'floats']
DEEP = KINDS[5:]
side = st.integers(1, 40)
pictures = st.lists(st.tuples(st.sampled_from(['.png', '.webp', '']), st.sampled_from(KINDS[:3]), side, side),
                    min_size=5, max_size=9)
odd_pictures = st.lists(st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(KINDS), side, side), max_size=9)
strange = st.lists(st.sampled_from([*OTHERS, *DAMAGED, *LINKS, 'up', '.DS_Store']), max_size=3, unique=True)
harmless = st.lists(st.sampled_from([*OTHERS, *LINKS, 'up', '.DS_Store']), max_size=2, unique=True)

def folders(names, pictures, strange, **sizes):
    "Places (with names of folders), the pictures in each of them, and what else lies there"
    return st.lists(st.tuples(names, pictures, strange), unique_by=lambda f: f[0], **sizes)

one = st.sampled_from(CLASSES).map(lambda name: (name,)) | st.tuples(st.sampled_from(CLASSES), st.just('front'))
usual = st.sampled_from([('train', 'val'), ('Training', 'TEST')])
tidy = folders(one, pictures, harmless, min_size=2, max_size=4).filter(lambda fs: len({p[0] for p, *_ in fs}) > 1)
split = st.tuples(usual, tidy).map(lambda x: [((top, *place), *rest) for top in x[0] for place, *rest in x[1]])
wild = folders(st.lists(st.sampled_from(ODD), max_size=3).map(tuple), odd_pictures, strange, max_size=5)
mixed = folders(one, odd_pictures | pictures, strange, min_size=2, max_size=4)

def write(root, data):
    "Write a data set; gives the files of each place that can be read, those that can't, and all that is no picture"
    good, bad, rest = Counter(), Counter(), Counter()
    for c, (place, pictures, strange) in enumerate(data):
        path = root.joinpath(*place)
        path.mkdir(parents=True, exist_ok=True)
        for i, (suffix, kind, h, w) in enumerate(pictures):
            file, how = path/f'{i}{suffix}', dict(quality=100) if FORMATS[suffix] in ('JPEG', 'WEBP') else {}
            if kind in DEEP and FORMATS[suffix] not in ('PNG', 'TIFF', 'PPM'): continue
            try: grey(kind, (w, h), 10 + 20*c).save(file, FORMATS[suffix], **how)
            except (OSError, ValueError, KeyError): file.unlink(missing_ok=True)      # the format can't hold it
            else:
                unknown = kind == 'floats' or (kind, FORMATS[suffix]) == ('integers', 'TIFF')
                (bad if unknown else good)[place] += 1
        for name in strange:
            if name in DAMAGED: (path/name).write_bytes(DAMAGED[name])
            elif name == 'pipe': os.mkfifo(path/'pipe.png')
            elif name == 'up': (path/name).symlink_to(root)
            elif name in LINKS: (path/f'{name}.png').symlink_to(LINKS[name])
            else: (path/name).write_text('no image')
            (bad if name in DAMAGED else rest)[place] += 1
    return good, bad, rest

def hidden(place): return any(name.startswith('.') for name in place)

def check(data, good_form, skip_bad, resize):
    "One data set; gives whether it was accepted"
    root = Path(tempfile.mkdtemp(prefix='fuzz-'))
    try:
        good, bad, rest = write(root, data)
        try:
            dls = folder_dls(root, img_size=8, in_chans=1, bs=4, augment=False, device='cpu', skip_bad=skip_bad,
                             resize=resize)
        except ValueError as e:
            assert str(root) in str(e) and '\n' not in str(e) and not good_form
            return False
    finally: shutil.rmtree(root)
    facts = describe(dls)
    assert not any('\n' in line for line in fact_lines(facts))
    tops = {s['folder']: name for name, s in facts['splits'].items() if s['folder']}
    depth = 1 if tops else 0
    seen = {place for place in [*good, *bad, *rest] if not hidden(place)}
    inside = {place for place in seen if len(place) > depth}
    # every picture has the class of the folder in which it was, and lies in its split
    for name, dl in zip(('train', 'valid', 'test'), dls):
        for x, y in zip(dl.dataset.x, dl.dataset.y):
            place = data[round((int(x[x != 128].median()) - 10)/20)][0]         # 128 is the border
            assert dls.vocab[y] == place[depth] and (not tops or tops[place[0]] == name or name not in tops.values())
    # each of them is used, and all else is left out for a reason
    used = Counter()
    for place in inside: used[place[depth]] += good[place]
    classes = {c['name']: c['train'] + c['valid'] + c['test'] for c in facts['classes']}
    assert classes == {name: n for name, n in used.items() if n}
    assert skip_bad or not sum(bad[place] for place in inside)
    left = sum(n for why, n in facts['left_out'].items() if why != 'a folder without images')
    heads = {place[:[n[0] for n in place].index('.') + 1] for place, *_ in data if hidden(place)}
    assert left == len(heads) + sum(rest[p] + bad[p] + (good[p] if len(p) <= depth else 0) for p in seen)
    return True

def test_random_folders(slow):
    "25 data sets, 200 with --slow, or as many as FUZZ says"
    accepted = Counter()
    @settings(max_examples=int(os.environ.get('FUZZ', 200 if slow else 25)), deadline=None, database=None,
              phases=[Phase.generate], derandomize='FUZZ' not in os.environ, suppress_health_check=list(HealthCheck))
    @given(st.tuples(tidy | split, st.just(True)) | st.tuples(mixed | wild, st.just(False)), st.booleans(),
           st.sampled_from(['crop', 'squash', 'pad']))
    def run(data, skip_bad, resize): accepted[check(*data, skip_bad, resize)] += 1
    run()
    assert min(accepted[True], accepted[False]) > 3, accepted       # both ways were tried
