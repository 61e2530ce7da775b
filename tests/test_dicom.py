"DICOM of every kind that a scanner writes, and what may be known of a patient afterwards."

import numpy as np
import pandas as pd
import pytest
from pydicom import examples
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid
from fada.images import blank_outside, dicom_facts, dicom_scale, hashed, pick_frames, read_dicom, read_image
from fada.readers import read_any
from fada.settings import FadaError

RAMP = np.tile(np.linspace(0, 255, 64).round(), (16, 1))


def write(path, a=RAMP, kind='MONOCHROME2', bits=8, region=None, frames=1, **tags):
    "A small ultrasound file: `a` is frames × rows × columns [× 3]"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    a = np.asarray(a, np.uint8 if bits == 8 else np.uint16)
    colour = a.shape[-1] == 3
    ds.Rows, ds.Columns = a.shape[-3:-1] if colour else a.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 3 if colour else 1, kind, 0
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored = (8, 8) if bits == 8 else (16, bits)
    ds.HighBit = ds.BitsStored - 1
    if frames > 1:
        ds.NumberOfFrames = frames
    ds.PixelData = a.tobytes()
    if region:
        r = Dataset()
        r.update({})
        for k, v in dict(
            RegionLocationMinX0=0,
            RegionLocationMinY0=0,
            RegionLocationMaxX1=60,
            RegionLocationMaxY1=15,
            PhysicalUnitsXDirection=3,
            PhysicalUnitsYDirection=3,
            PhysicalDeltaX=0.01,
            PhysicalDeltaY=0.01,
            **{},
        ).items():
            setattr(r, k, region.get(k, v))
        ds.SequenceOfUltrasoundRegions = Sequence([r])
    for k, v in tags.items():
        setattr(ds, k, v)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def row(path, frame=0):
    return np.asarray(read_dicom(path, frame)[0])[0].astype(int)


def test_monochrome_windows_and_depth(tmp_path):
    p = tmp_path / 'a.dcm'
    assert abs(row(write(p))[:, 0] - RAMP[0]).max() <= 1
    assert abs(row(write(p, kind='MONOCHROME1'))[:, 0] - (255 - RAMP[0])).max() <= 1
    assert abs(row(write(p, RAMP * 16, bits=12))[:, 0] - RAMP[0]).max() <= 1
    v = row(write(p, WindowCenter=128, WindowWidth=64))[:, 0]  # below 96 black, above 160 white, a ramp between
    assert v[RAMP[0] < 95].max() == 0 and v[RAMP[0] > 161].min() == 255 and 110 < v[abs(RAMP[0] - 128).argmin()] < 145
    rescaled = row(
        write(p, RAMP * 16, bits=12, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=4000, WindowWidth=8000)
    )[:, 0]
    assert (np.diff(rescaled) >= 0).all() and rescaled[-1] > 250


def test_colour_of_every_kind(tmp_path):
    a = np.zeros((16, 64, 3))
    a[..., 0] = 200
    a[..., 2] = 40
    assert row(write(tmp_path / 'rgb.dcm', a, 'RGB'))[5].tolist() == [200, 0, 40]
    y = np.zeros((16, 64, 3))
    y[..., 0], y[..., 1], y[..., 2] = 76, 85, 255  # pure red in YBR_FULL
    r, g, b = row(write(tmp_path / 'ybr.dcm', y, 'YBR_FULL'))[5]
    assert r > 245 and g < 10 and b < 10
    assert read_image(examples.get_path('palette_color')).mode == 'RGB'
    assert np.asarray(read_image(examples.get_path('ybr_color'))).std() > 10


def test_millimetres_only_where_they_hold(tmp_path):
    import pydicom

    scale = lambda **r: dicom_scale(
        pydicom.dcmread(write(tmp_path / 'r.dcm', region=r or dict(RegionLocationMinX0=0)))
    )
    assert scale() == 0.1
    for wrong in (
        dict(RegionLocationMaxX1=64),
        dict(PhysicalUnitsXDirection=4),
        dict(PhysicalDeltaY=0.02),
        dict(PhysicalDeltaX=-0.01),
    ):
        assert scale(**wrong) is None, wrong


def test_a_cine_gives_the_frames_that_were_chosen(tmp_path):
    a = np.stack([RAMP * 0 + 20 * k for k in range(10)])
    a[:, :, ::2] += 30
    write(tmp_path / 'Femur' / 'cine.dcm', a, frames=10, PatientID='X1')
    pd.DataFrame({'Image Name': ['cine.dcm'], 'Q6': ['good']}).to_csv(tmp_path / 'Femur' / 'a.csv', index=False)
    got = lambda f: [x['image'] for x in read_any(tmp_path, frames=f).rows]
    assert got('middle') == ['Femur/cine.dcm#5'] and len(got('every 3')) == 4 and len(got('all')) == 10
    assert np.asarray(read_image(tmp_path / 'Femur' / 'cine.dcm#5'))[0, 1, 0] == 100
    with pytest.raises(FadaError, match='0 to 9'):
        pick_frames(10, '10')


def test_no_name_survives(tmp_path, monkeypatch):
    monkeypatch.setenv('FADA_SALT', 'one')
    tags = dict(
        PatientName='Miller^Anna',
        PatientID='12345',
        PatientBirthDate='19900312',
        InstitutionName='St Mary',
        OperatorsName='Jones',
        Manufacturer='GE',
        ManufacturerModelName='Voluson E10',
        StudyDate='20240101',
    )
    for k in range(2):
        write(tmp_path / 'Femur' / f'{k}.dcm', RAMP + 0 * k, **tags)
    facts = dicom_facts(tmp_path / 'Femur' / '0.dcm')
    text = str(facts)
    assert not any(w in text for w in ('Miller', 'Anna', '12345', '1990', 'Mary', 'Jones', '2024'))
    assert facts['machine'] == 'GE Voluson E10' and facts['patient'].startswith('p-')
    pd.DataFrame({'Image Name': ['0', '1'], 'Q6': ['good'] * 2}).to_csv(tmp_path / 'Femur' / 'a.csv', index=False)
    t = read_any(tmp_path).table
    assert t.patient.nunique() == 1 and not t.to_csv().count('Miller')
    monkeypatch.setenv('FADA_SALT', 'two')
    assert dicom_facts(tmp_path / 'Femur' / '0.dcm')['patient'] != facts['patient']


def test_tags_stand_above_the_name_of_a_file(tmp_path, monkeypatch):
    "One patient by the tags though the names count two; without a PatientID the name's number, hashed"
    monkeypatch.setenv('FADA_SALT', 'one')
    names = ['Patient41_a', 'Patient42_b', 'Patient43_c']
    for k, n in enumerate(names):
        write(
            tmp_path / 'Femur' / f'{n}.dcm',
            RAMP + 0 * k,
            **(dict(PatientID='X1', InstitutionName='St Mary') if k < 2 else {}),
        )
    pd.DataFrame({'Image Name': names, 'Q6': ['good'] * 3}).to_csv(tmp_path / 'Femur' / 'a.csv', index=False)
    r = read_any(tmp_path)
    who = r.table.set_index('image').patient
    assert (
        who[:2].unique().tolist() == [hashed('X1')]
        and who.iloc[2] == hashed('named:43')
        and who.iloc[2].startswith('p-')
    )
    assert not any(f'named:{n}' in r.table.to_csv() for n in (41, 42, 43)) and r.mapping['file names'] == {
        'patient': 'patient'
    }


@pytest.mark.parametrize(
    'name,text,sector',
    [
        (
            'palette_color',
            [(0, 58, 0, 800), (60, 350, 0, 120), (60, 350, 730, 800), (85, 110, 100, 310)],
            (105, 135, 380, 510),
        ),
        ('ybr_color', [(220, 240, 0, 320), (0, 240, 285, 320), (0, 40, 0, 30)], (60, 180, 140, 200)),
        ('rgb_color', [(0, 45, 0, 320), (175, 240, 0, 320)], (60, 150, 60, 260)),
    ],
)
def test_text_of_real_frames_is_blanked(name, text, sector):
    "pydicom's ultrasound frames: name bar, settings, scales and menus go, what the probe saw stays"
    image = read_image(examples.get_path(name))
    a = np.asarray(image)
    b = np.asarray(blank_outside(image))
    for y0, y1, x0, x1 in text:
        assert a[y0:y1, x0:x1].max() > 100 and not b[y0:y1, x0:x1].any(), (y0, y1, x0, x1)
    y0, y1, x0, x1 = sector
    assert (a[y0:y1, x0:x1] == b[y0:y1, x0:x1]).all()


def test_frames_of_one_cine_keep_their_brightness(tmp_path):
    "Depth comes from the file, not from the brightest pixel of a frame"
    a = np.stack([RAMP * 4, RAMP * 16])
    p = write(tmp_path / 'c.dcm', a, bits=12, frames=2)
    assert abs(row(p, 0)[:, 0] - RAMP[0] / 4).max() <= 1 and abs(row(p, 1)[:, 0] - RAMP[0]).max() <= 1
    assert (
        abs(
            row(write(p, RAMP * 16 - 2048 + 2048, bits=12, RescaleSlope=2, RescaleIntercept=-100))[:, 0] - RAMP[0]
        ).max()
        <= 1
    )
    c = np.repeat((RAMP * 4)[..., None], 3, 2)
    q = write(tmp_path / 'rgb.dcm', c, 'RGB', bits=10)
    assert abs(row(q)[:, 0] - RAMP[0]).max() <= 1


def test_depth_of_a_still_picture(tmp_path):
    from PIL import Image

    for k, top in enumerate((200, 4000, 60000)):
        Image.fromarray(np.full((8, 8), top, np.uint16)).save(tmp_path / f'{k}.png')
        assert abs(int(np.asarray(read_image(tmp_path / f'{k}.png'))[0, 0, 0]) - top / 257) <= 1
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(tmp_path / '12.tif', tiffinfo={281: 4095})
    assert np.asarray(read_image(tmp_path / '12.tif'))[0, 0, 0] == 127
    Image.fromarray(np.full((8, 8), 900, np.float32)).save(tmp_path / 'f.tif')
    with pytest.raises(FadaError, match='floats up to 900'):
        read_image(tmp_path / 'f.tif')
