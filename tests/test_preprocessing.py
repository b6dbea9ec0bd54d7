"""Pictures of all shapes become the numbers that timm, torchvision and transformers make, or the error says why not."""
import json, os, struct, zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from vit_nbdev.preprocessing import (UNREAD, Preprocessing, is_special, open_image, timm_preprocessing,
                                     torchvision_preprocessing, transformers_preprocessing)

HALF = [0.5]*3
SHAPES = [(1, 60), (60, 1), (1, 1), (10, 100), (100, 10), (640, 64), (64, 640), (3, 5), (223, 224), (225, 223),
          (341, 256),
          (256, 341), (343, 256), (500, 375), (375, 500), (640, 427), (427, 640), (1000, 100)]

@pytest.fixture(scope='module')
def pictures():
    "64 pictures: a photograph in many shapes, and noise, which forgives nothing"
    rng, photo = np.random.default_rng(0), Image.fromarray(load_sample_image('china.jpg'))
    shapes = SHAPES + [tuple(rng.integers(20, 600, 2).tolist()) for _ in range(64 - len(SHAPES))]
    noise = [Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8)) for w, h in shapes]
    return [noise[i] if i % 3 == 2 else photo.resize(shape) for i, shape in enumerate(shapes)]

def steps(prep, theirs, picture):
    "Largest difference between our normalised numbers and theirs, in steps of the 255 that a pixel has"
    mine = prep.normalise(prep(picture))
    assert mine.shape == theirs.shape
    std = torch.tensor(prep.std).view(-1, 1, 1)
    return ((mine - theirs).abs()*std/prep.scale).max().item()

TIMM = dict(input_size=(3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation='bicubic', crop_pct=0.9)
TIMM_CONFIGS = {
    'center': {}, 'center, bilinear': dict(interpolation='bilinear', crop_pct=0.95, input_size=(3, 256, 256)),
    'no square': dict(input_size=(3, 160, 240)), 'squash': dict(crop_mode='squash', crop_pct=1.),
    'squash and cut': dict(crop_mode='squash'), 'border': dict(crop_mode='border', mean=(0.48, 0.45, 0.4)),
    'border, whole': dict(crop_mode='border', crop_pct=1.), 'lanczos': dict(interpolation='lanczos'),
    'nearest': dict(interpolation='nearest'), 'box': dict(interpolation='box'),
}

@pytest.mark.parametrize('name', TIMM_CONFIGS)
def test_timm(name, pictures):
    data = pytest.importorskip('timm.data')
    cfg = TIMM | TIMM_CONFIGS[name]
    theirs = data.create_transform(**data.resolve_data_config(pretrained_cfg=cfg, args={}))
    prep = timm_preprocessing(cfg)
    assert max(steps(prep, theirs(p), p) for p in pictures) < 0.01

@pytest.mark.parametrize('model, weights', [('vit_b_16', 'IMAGENET1K_V1'), ('vit_l_16', 'IMAGENET1K_V1'),
                                            ('vit_b_16', 'IMAGENET1K_SWAG_E2E_V1'),
                                            ('vit_b_16', 'IMAGENET1K_SWAG_LINEAR_V1')])
def test_torchvision(model, weights, pictures):
    from torchvision.models import get_model_weights
    theirs = get_model_weights(model)[weights].transforms()
    prep = torchvision_preprocessing(theirs)
    assert max(steps(prep, theirs(p), p) for p in pictures) < 0.01

TRANSFORMERS = {   # the class, what is changed in it, and how far we may be off
    'ViT':             ('ViT', {}),
    'ViT, no square':  ('ViT', dict(size=dict(height=160, width=240), resample=3)),
    'DeiT':            ('DeiT', {}),
    'CLIP':            ('CLIP', {}),
    'CLIP, integers':  ('CLIP', dict(size=224, crop_size=224)),
    'CLIP, too small': ('CLIP', dict(size=dict(shortest_edge=200))),
    'SigLIP':          ('Siglip', {}),
    'DINOv2':          ('Bit', dict(size=dict(shortest_edge=256), image_mean=[0.485, 0.456, 0.406],
                                    image_std=[0.229, 0.224, 0.225])),
    'do_resize':       ('CLIP', dict(do_resize=False)),
    'do_rescale':      ('ViT', dict(do_rescale=False, image_mean=[127.5]*3, image_std=[127.5]*3)),
    'rescale_factor':  ('ViT', dict(rescale_factor=1/127.5, image_mean=[1.]*3, image_std=[1.]*3)),
    'do_normalize':    ('ViT', dict(do_normalize=False)),
    'nearest':         ('ViT', dict(resample=0)),
    'lanczos':         ('ViT', dict(resample=1)),
}

@pytest.mark.parametrize('name', TRANSFORMERS)
def test_transformers(name, pictures):
    transformers = pytest.importorskip('transformers')
    family, changes = TRANSFORMERS[name]
    processor = getattr(transformers, f'{family}ImageProcessor')(**changes)
    prep = transformers_preprocessing(json.loads(processor.to_json_string()), where='preprocessor_config.json')
    assert max(steps(prep, processor(p, return_tensors='pt')['pixel_values'][0], p) for p in pictures) < 0.01

def test_dinov3_resizes_floats(pictures):
    "Its processor resizes after scaling, so its numbers are not rounded to 255 steps in between, as ours are"
    transformers = pytest.importorskip('transformers')
    processor = transformers.DINOv3ViTImageProcessor()
    prep = transformers_preprocessing(json.loads(processor.to_json_string()))
    assert max(steps(prep, processor(p, return_tensors='pt')['pixel_values'][0], p) for p in pictures) < 1.1

def test_defaults_are_those_of_transformers():
    "What a file leaves out is what the class does"
    transformers = pytest.importorskip('transformers')
    for family in ('ViT', 'DeiT', 'CLIP', 'Siglip', 'Bit', 'DINOv3ViT'):
        whole = json.loads(getattr(transformers, f'{family}ImageProcessor')().to_json_string())
        bare = dict(image_processor_type=f'{family}ImageProcessorFast')
        assert transformers_preprocessing(bare) == transformers_preprocessing(whole), family

def test_a_very_long_picture_needs_little_memory():
    "Only what is kept is resized; the numbers are those of a shorter picture with the same middle"
    prep = Preprocessing(64, HALF, HALF)
    ramp = np.tile(np.arange(2, dtype=np.uint8)[:, None, None]*200, (1, 60_000, 3))
    assert torch.equal(prep(ramp), prep(ramp[:, :6000]))

# --- files ---

def test_what_files_hold(tmp_path):
    "Grey as colour, 16 bits, transparency, a photo on its side, arrays and PIL images"
    pixels = np.random.default_rng(1).integers(256, size=(28, 28)).astype(np.uint8)
    grey, colour = Preprocessing(28, [0.5], [0.5], in_chans=1), Preprocessing(28, HALF, HALF)
    Image.fromarray(pixels).save(tmp_path/'a.png')
    assert (grey(tmp_path/'a.png')[0].numpy() == pixels).all()
    assert (colour(str(tmp_path/'a.png')).numpy() == pixels).all()
    assert torch.equal(grey(pixels), grey(Image.open(tmp_path/'a.png')))
    Image.fromarray(pixels.astype(np.uint16)*257).save(tmp_path/'deep.png')
    assert (grey(tmp_path/'deep.png')[0].numpy() == pixels).all()
    Image.new('RGBA', (28, 28), (0, 0, 0, 0)).save(tmp_path/'clear.png')
    assert grey(tmp_path/'clear.png').unique().tolist() == [255]
    exif = Image.Exif()
    exif[274] = 6                                                        # the camera was held on its side
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path/'side.png', exif=exif)
    for image in (tmp_path/'side.png', Image.open(tmp_path/'side.png'), open_image(tmp_path/'side.png')):
        assert (grey(image)[0].numpy() == pixels).all()

@pytest.mark.parametrize('mode, colour, seen', [
    ('RGBA', (200, 0, 0, 0), [255]*3), ('RGBA', (50, 0, 0, 255), [100, 0, 0]), ('LA', (50, 0), [255]*3),
    ('LA', (50, 255), [100]*3), ('RGBA', (50, 0, 0, 102), [193, 153, 153]), ('CMYK', (255, 255, 255, 0), [0]*3)])
def test_the_range_of_values_leaves_transparency_alone(mode, colour, seen):
    image = Image.new(mode, (2, 2), colour)
    for value_range in [(0, 127.5)] + [(0, 255)]*(seen in ([255]*3, [0]*3)):
        x = Preprocessing(2, HALF, HALF, value_range=value_range)(image)
        assert x[:, 0, 0].tolist() == seen
    clear = Image.new('P', (2, 2))
    clear.info['transparency'] = 0
    assert Preprocessing(2, HALF, HALF, value_range=(0, 255))(clear).unique().tolist() == [255]

@pytest.mark.parametrize('kind, values, value_range', [('floats', np.float32([[0, 1], [0.5, 0.25]]), (0, 1)),
                                                       ('32-bit integers', np.int32([[0, 4095], [2048, 1024]]),
                                                        (0, 4095)),
                                                       ('floats', np.float32([[-1, 1], [0, -0.5]]), (-1, 1))])
def test_black_and_white_must_be_known(kind, values, value_range, tmp_path):
    Image.fromarray(values).save(tmp_path/'a.tiff')
    prep = dict(img_size=2, mean=[0.5], std=[0.5], in_chans=1)
    with pytest.raises(ValueError, match=f'a.tiff holds {kind}, whose black and white are not known'):
        Preprocessing(**prep)(tmp_path/'a.tiff')
    x = Preprocessing(**prep, value_range=value_range)(tmp_path/'a.tiff')[0]
    black, white = value_range
    assert np.abs(x.numpy() - (values - black)/(white - black)*255).max() <= 0.5

def test_files_that_are_none(tmp_path):
    import os
    (tmp_path/'note.png').write_text('no image')
    (tmp_path/'phone.heic').write_text('no image')
    os.mkfifo(tmp_path/'pipe.png')                                       # reading it would wait for ever
    Image.new('L', (400, 400)).save(tmp_path/'large.png')
    with pytest.raises(ValueError, match="note.png can't be read as an image: replace it or take it away"):
        open_image(tmp_path/'note.png')
    with pytest.raises(ValueError, match='phone.heic is of a format that pillow can.t read here: convert it'):
        open_image(tmp_path/'phone.heic')
    with pytest.raises(ValueError, match='pipe.png is no ordinary file'): open_image(tmp_path/'pipe.png')
    with pytest.raises(ValueError, match='is a folder, expected an image file'): open_image(tmp_path)
    with pytest.raises(FileNotFoundError, match='there is no file .*nowhere.png'): open_image(tmp_path/'nowhere.png')
    with pytest.raises(TypeError, match='got a int, expected an image file'): Preprocessing(8, HALF, HALF)(3)
    with pytest.raises(ValueError, match='in_chans=4: images are read as 1 channel'):
        Preprocessing(8, [.5]*4, [.5]*4, in_chans=4)(tmp_path/'large.png')

def test_all_that_is_told_in_pixels_grows_together():
    prep = Preprocessing(32, HALF, HALF, resize_size=(40, 36), keep=(34, 32))
    assert prep.at_size((64, 48)) == Preprocessing((64, 48), HALF, HALF, resize_size=(80, 54), keep=(68, 48))
    assert Preprocessing.from_dict(prep.to_dict()) == prep

def test_a_border_has_the_colour_that_was_asked_for():
    "The mean, as timm's, or a grey that does not change with the statistics"
    long = np.zeros((8, 32, 3), np.uint8)
    for fill, grey in ((None, 64), (128, 128), (0, 0)):
        x = Preprocessing(16, [0.25]*3, HALF, resize='pad', fill=fill)(long)
        assert x.shape == (3, 16, 16) and (x[:, :6] == grey).all() and (x[:, 6:10] == 0).all()
    assert Preprocessing(16, HALF, HALF, resize='pad') == Preprocessing(16, HALF, HALF, resize='border')
    for fill in (-1, 256, 0.5, 'grey'):
        with pytest.raises(ValueError, match='fill=.* must be an integer'): Preprocessing(8, HALF, HALF, fill=fill)

@pytest.mark.parametrize('how, kept', [({}, 1/3), (dict(resize='squash'), 1), (dict(resize='pad'), 1),
                                       (dict(crop_pct=0.5), 1/12), (dict(resize='none'), 32*32/(300*100))])
def test_how_much_is_kept(how, kept): assert abs(Preprocessing(32, HALF, HALF, **how).kept(100, 300) - kept) < 1e-9

def test_what_pillow_stumbles_over_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path/'empty.png').touch()
    with pytest.raises(ValueError, match='empty.png is empty: replace it'): open_image(tmp_path/'empty.png')
    Image.new('L', (9, 9)).save(tmp_path/'a.png')
    for error in (IndexError('x'), KeyError('x'), struct.error('x'), EOFError(), zlib.error('x'), OverflowError('x')):
        def fails(*args, error=error, **kwargs): raise error
        monkeypatch.setattr(Image, 'open', fails)
        with pytest.raises(ValueError, match="a.png can't be read as an image"): open_image(tmp_path/'a.png')

def test_colours_are_not_taken_for_grey(tmp_path):
    "A palette's numbers and one bit are no values between black and white"
    im = Image.new('P', (4, 4), 1)
    im.putpalette([0, 0, 0, 200, 200, 200])
    im.save(tmp_path/'a.png')
    for values in (None, (0, 255)):
        prep = Preprocessing(4, [.5], [.5], in_chans=1, value_range=values)
        assert prep(tmp_path/'a.png').unique().tolist() == [200]
        assert prep(Image.new('1', (4, 4), 1)).unique().tolist() == [255]
    mask = Preprocessing(4, [.5], [.5], in_chans=1, value_range=(0, 3))(np.full((4, 4), 2, np.uint8))
    assert mask.unique().tolist() == [170]

def test_a_bomb_is_named(tmp_path, monkeypatch):
    Image.new('L', (400, 400)).save(tmp_path/'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)
    with pytest.raises(ValueError, match='large.png has too many pixels to be read safely'):
        open_image(tmp_path/'large.png')

# --- descriptions ---

GOOD = dict(img_size=8, mean=HALF, std=HALF)
BAD_FIELDS = {
    'interpolation': ('cubic', 'interpolation=.cubic. must be one of nearest'),
    'resize': ('stretch', 'resize=.stretch. must be one of crop'),
    'backend': ('jax', 'backend=.jax. must be one of pillow'),
    'img_size': (0, 'img_size=.0, 0. must be a positive integer'),
    'resize_size': (3.5, 'resize_size=3.5 must be a positive integer'),
    'in_chans': (1, 'mean=.* must be 1 finite numbers'),
    'mean': ([0.5], 'mean=.* must be 3 finite numbers'), 'std': ([0.5, 0, 0.5], 'std=.* must be above zero'),
    'crop_pct': (-1, 'crop_pct=-1 must be a number above zero'),
    'scale': (float('nan'), 'scale=nan must be a number above zero'),
    'value_range': ([1, 0], 'value_range=.* must be two numbers'),
    'antialias': (False, 'antialias=False must be True with backend=.pillow.'),
    'labels': ([1, 2], 'labels=.* must be a list of strings'), 'crop': (1, 'unknown fields crop; known: img_size'),
}

@pytest.mark.parametrize('name', BAD_FIELDS)
def test_bad_fields_are_named_with_their_source(name):
    value, sentence = BAD_FIELDS[name]
    with pytest.raises(ValueError, match=f'run/config.json:? .*{sentence}'):
        Preprocessing.from_dict(GOOD | {name: value}, 'run/config.json')

def test_contradictions_and_gaps():
    with pytest.raises(ValueError, match='crop_pct=0.9 must be left out, since resize_size=.9, 9. says the same'):
        Preprocessing(**GOOD, crop_pct=0.9, resize_size=9)
    with pytest.raises(ValueError, match="interpolation='box' must be another one with backend='torch'"):
        Preprocessing(**GOOD, interpolation='box', backend='torch')
    with pytest.raises(ValueError, match='config.json lacks mean'):
        timm_preprocessing(dict(input_size=(3, 8, 8), std=HALF))
    with pytest.raises(ValueError, match="config.json: crop_mode='tile' must be one of center"):
        timm_preprocessing(TIMM | dict(crop_mode='tile'))
    with pytest.raises(ValueError, match='config.json: interpolation=.hamming. must be'):
        timm_preprocessing(TIMM | dict(interpolation='hamming'))
    with pytest.raises(ValueError, match='preprocessor_config.json neither resizes nor crops'):
        transformers_preprocessing(dict(do_resize=False))
    with pytest.raises(ValueError, match='resample=5 must be one of'): transformers_preprocessing(dict(resample=5))
    for mean, std in (([1, 2, 3, 4], HALF), (HALF, True), (True, HALF), ('a', HALF), (HALF, {})):
        with pytest.raises(ValueError, match='image_mean=.* and image_std=.* must be numbers, or lists of one length'):
            transformers_preprocessing(dict(image_mean=mean, image_std=std))
    with pytest.raises(ValueError, match='is list, expected a dict'): Preprocessing.from_dict([1], 'a.json')

def test_runs_of_before_still_read():
    "The description that a run folder had until now"
    old = dict(img_size=28, in_chans=1, mean=[0.13], std=[0.31], labels=['a', 'b'])
    prep = Preprocessing.from_dict(old)
    assert prep.img_size == (28, 28) and prep.labels == ('a', 'b') and prep.interpolation == 'bilinear'
    assert Preprocessing.from_dict(old | dict(interpolation='bicubic', crop_pct=0.9)).resized == (31, 31)

def test_normalise_and_back():
    prep = Preprocessing(2, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    x = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)*20
    z = prep.normalise(x)
    assert torch.allclose(z[0, 2], (x[0, 2]/255 - 0.3)/0.6)
    assert torch.allclose(prep.denormalise(z)*255, x.float(), atol=1e-4)
    assert prep.normalise(x.double()).dtype == torch.float64

def test_what_is_refused_before_it_is_opened(tmp_path):
    "A device, since reading it may never end, and kinds that pillow can't read; memory that looks like a folder may do"
    assert is_special('/dev/zero') and is_special('/proc/self/mem')
    assert not is_special('/dev/shm/cat.jpg') and not is_special('cat.jpg')
    for suffix in UNREAD:
        (tmp_path/f'cat{suffix}').write_bytes(b'no picture')
        with pytest.raises(ValueError, match='convert it to JPEG or PNG'): open_image(tmp_path/f'cat{suffix}')

def test_the_middle_of_which_a_part_is_kept_holds_the_image():
    with pytest.raises(ValueError, match=r'keep=\(10, 10\) must be .* at least \(32, 32\)'):
        Preprocessing(32, [.5], [.5], in_chans=1, keep=(10, 10))
    for resize_size in (None, 40):
        assert Preprocessing(32, [.5], [.5], in_chans=1, resize_size=resize_size).at_size(64).img_size == (64, 64)

def png_of_16_bits(path, value):
    "A PNG of 2 x 2 pixels of one colour, 16 bits each: pillow writes none"
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + struct.pack('>6H', *[value]*6) for _ in range(2))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>2I5B', 2, 2, 16, 2, 0, 0, 0))
                     + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    return path

def test_colours_of_16_bits(tmp_path):
    "pillow reads the higher 8 of each, so a range that is meant for all 16 would make them black"
    file = png_of_16_bits(tmp_path/'deep.png', 0x8000)
    assert Preprocessing(2, HALF, HALF)(file).unique().tolist() == [0x80]
    with pytest.raises(ValueError, match='deep.png has colours of 16 bits, of which pillow reads'):
        Preprocessing(2, HALF, HALF, value_range=(0, 4095))(file)
    (tmp_path/'deep.ppm').write_bytes(b'P6 2 2 65535\n' + bytes(24))
    with Image.open(file) as im:
        for deep in (tmp_path/'deep.ppm', im):
            with pytest.raises(ValueError, match='has colours of 16 bits'):
                Preprocessing(2, HALF, HALF, value_range=(0, 65535))(deep)
    (tmp_path/'plain.pbm').write_bytes(b'P1 2 2\n0 1 1 0\n')                 # pillow tells its codec something else
    with Image.open(tmp_path/'plain.pbm') as im:
        for plain in (tmp_path/'plain.pbm', im):
            assert Preprocessing(2, HALF, HALF)(plain)[0].tolist() == [[255, 0], [0, 255]]
    (tmp_path/'flat.ppm').write_bytes(b'P6 2 2 255\n' + bytes(12))
    assert Preprocessing(2, HALF, HALF, value_range=(0, 255))(tmp_path/'flat.ppm').max() == 0

@pytest.mark.parametrize('kind', ['jpg', 'png', 'webp'])
def test_a_damaged_note_of_the_camera_says_nothing(kind, tmp_path):
    image = Image.new('RGB', (9, 7), 'red')
    image.save(tmp_path/f'a.{kind}', dpi=(72, 72), exif=b'Exif\0\0' + bytes(8), lossless=True, quality=100)
    x = Preprocessing((7, 9), HALF, HALF)(tmp_path/f'a.{kind}')
    assert x.shape == (3, 7, 9) and x[0].min() > 250
    with Image.open(tmp_path/f'a.{kind}') as im: assert torch.equal(Preprocessing((7, 9), HALF, HALF)(im), x)

def test_a_picture_on_its_side_whose_other_notes_are_odd(tmp_path):
    "pillow's own way writes all notes again, and fails at those of another type than is usual"
    tiff = b'MM\0*' + struct.pack('>IH', 8, 2) + struct.pack('>HHIHH', 0x112, 3, 1, 6, 0) \
        + struct.pack('>HHIBBBB', 0x128, 7, 1, 2, 0, 0, 0) + bytes(4)
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)*20).save(tmp_path/'odd.png', exif=tiff)
    upright = open_image(tmp_path/'odd.png')
    assert np.array_equal(np.asarray(upright), np.rot90(np.arange(12).reshape(3, 4)*20, -1)) and upright.format == 'PNG'
    assert upright.getexif().get(0x112) is None and upright.size == (3, 4)           # the note is gone

def test_folders_of_windows_are_no_devices(monkeypatch):
    monkeypatch.setattr('vit_nbdev.preprocessing.os', SimpleNamespace(name='nt', sep='\\', path=os.path))
    assert not is_special('C:\\dev\\pictures\\a.jpg')
