"""The four depth-hand data sets: loaders that crop around the hand centre."""

import random
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from frames.cache import cache_of, line_key
from frames.cameras import PRESETS
from frames.files import FrameError, LineFile, parse_numbers, read_bin, read_png, unpack_rgb
from frames.samples import LABEL_SIZE, HandFrame, Sample, move_hand, prepare_crop, to_tensor
from frames.transforms import (
    ROTATION_DEG,
    Augmentation,
    Camera,
    Frame,
    Rect,
    augment_joints,
    box_size_px,
    center_of_mass,
    cut_bounding_box,
    draw_augmentation,
    joints_to_crop,
    recover_uvd,
    uvd2xyz,
    window_around,
    xyz2uvd,
)
from model import on_grid, spatial_form
from utils import UserError, check_command

PLAIN = Augmentation()

# Far beyond any picture (px) or working distance (mm).
MAX_CENTER = 1e5


class IndexLine(NamedTuple):
    """A line of an index file: where its frame lies, the text of its numbers, its key in a crop cache."""

    path: Path
    numbers: str
    key: int


class HandDataset(Dataset):
    """A split of a data set; a subclass says what its files, camera and joints are.

    Keywords keep the published names: `fx, fy, halfu, halfv` are the camera (px), `path` the data
    set's own folder, `sigmoid` and `kernel_size` the heatmaps' blur, `image_size` and `label_size`
    the sizes of crop and maps (px), `cube_size` half the edge of the hand's cube (mm), `dataset`
    the split, `process_mode` `uvd` (centre file) or `bb` (bounding box; HAND17's test split).
    `test_only` drops the labels; `targets=False` leaves heatmaps and depthmaps empty, for a caller
    that makes them with `model.spatial_form`. `rotation_deg, shift_mm, erasing, noise_mm` are what
    `draw_augmentation` takes. `lines` replaces the index file. `use_cache=False`
    reads the frames' files also where a crop cache (frames/cache.py) lies beside the index.

    Opens index and cache and no image. Raises UserError where the index is missing.
    """

    name = ""
    camera = Camera(1, 1, 0, 0)
    picture_px = (0, 0)  # width, height
    cube_mm = 0.0  # half the edge
    margin_mm = None  # how much narrower than the cube the window before the crop is; None: there is none
    joint_number = 0
    config = []  # joint indices from the palm outwards: thumb, index, middle, ring, little, palm
    labels_frame = "uvd"
    suffix = ".png"
    path_parts = 2  # of an index line's path, those below `frames_folder`
    process_modes = ("uvd",)

    def __init__(
        self,
        *,
        fx=None,
        fy=None,
        halfu=None,
        halfv=None,
        path=None,
        sigmoid=1.5,
        image_size=128,
        kernel_size=7,
        label_size=64,
        test_only=False,
        using_rotation=True,
        using_scale=True,
        using_shift=True,
        using_flip=False,
        rotation_deg=ROTATION_DEG,
        shift_mm=0.0,
        erasing=0.0,
        noise_mm=0.0,
        cube_size=None,
        joint_number=None,
        dataset="train",
        process_mode="uvd",
        targets=True,
        lines=None,
        use_cache=True,
    ):
        if dataset not in ("train", "val", "test"):
            raise UserError(f"dataset must be train, val or test, not {dataset!r}")
        if process_mode not in self.process_modes or process_mode == "bb" and dataset != "test":
            raise UserError(f"{self.name} {dataset} has no process_mode {process_mode!r}")
        given = zip((fx, fy, halfu, halfv), self.camera)
        self.camera = Camera(*(default if value is None else value for value, default in given))
        self.root = Path("Data", self.name) if path is None else Path(path)
        self.sigmoid, self.kernel_size = sigmoid, kernel_size
        self.image_size, self.label_size = image_size, label_size
        self.test_only, self.targets = test_only, targets
        using = dict(rotation=using_rotation, scale=using_scale, shift=using_shift, flip=using_flip)
        more = dict(shift_mm=shift_mm, erasing=erasing, noise_mm=noise_mm)
        self.augments = any(using.values()) or any(more.values())
        self.drawn = {part: bool(on) for part, on in using.items()} | more | {"rotation_deg": rotation_deg}
        self.cube_mm = float(self.cube_mm if cube_size is None else cube_size)
        self.joint_number = self.joint_number if joint_number is None else joint_number
        self.split, self.process_mode = dataset, process_mode
        self.lines = open_index(self) if lines is None else lines
        self.cache = cache_of(self) if use_cache and lines is None and process_mode == "uvd" else None

    def index_name(self):
        """Return the name of this split's index file."""
        return f"{self.split}.txt"

    def cache_name(self):
        """Return the name of the crop cache that holds this split's frames."""
        return f"{'train' if self.trains else 'test'}.cache"

    @property
    def trains(self):
        """Whether the frames are those that were recorded for training, to which a centre file belongs."""
        return self.split == "train"

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, key):
        """Return a sample; `key` is an index, or (index, seed) to fix the augmentation's draw.

        A bare index draws its seed from torch's global generator, which every DataLoader worker
        seeds anew each epoch.
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        if self.split != "train" or self.test_only or not self.augments:
            return self.sample(index)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        # After a decoding has emptied the processor's caches, NumPy's generator takes four times as long.
        return self.sample(index, draw_augmentation(random.Random(seed), **self.drawn))

    def sample(self, index, augmentation=PLAIN):
        """Return the Sample (UnlabelledSample with `test_only`) of frame `index` for one Augmentation.

        The plain sample is returned where an augmented joint leaves the heatmap grid, or the hand the
        crop. Raises FrameError where the frame cannot be used.
        """
        line = self.line(index)
        try:
            hand = self.load(line)
            try:
                crop, uvd = self._crop(hand, augmentation)
            except ValueError:
                if augmentation == PLAIN:
                    raise
                crop, uvd = self._crop(hand, PLAIN)
        except ValueError as error:
            raise FrameError(line.path, str(error)) from None
        if self.test_only:
            return crop
        if not self.targets:
            return Sample(*crop, uvd, torch.empty(0), torch.empty(0))
        blur = self.kernel_size, self.sigmoid
        heatmaps, depthmaps = spatial_form(uvd[None], crop.label_img[None], crop.mask[None], *blur)
        return Sample(*crop, uvd, heatmaps[0], depthmaps[0])

    def _crop(self, hand, augmentation):
        """Return (UnlabelledSample, normalised joints or None). Raises ValueError where it cannot be used."""
        hand = move_hand(hand, augmentation.shift_mm, self.margin_mm, self.camera)
        shift_u, shift_v = augmentation.shift_px
        u, v, d = hand.center_uvd
        com = np.array([int(u + shift_u), int(v + shift_v), d])
        uvd = None
        if not self.test_only:
            box_px = box_size_px(d, hand.cube_mm, self.camera)
            joints = joints_to_crop(hand.joints_uvd, com, box_px, self.image_size)
            uvd = augment_joints(joints, augmentation)
            uvd = uvd / (self.image_size - 1, self.image_size - 1, hand.cube_mm)
            # Whether a frame is usable must not depend on the network's size.
            grid = LABEL_SIZE if augmentation == PLAIN else self.label_size
            if not on_grid(uvd[:, :2], grid).all():
                raise ValueError("a joint lies outside the heatmap grid")
            uvd = to_tensor(uvd)
        crop = prepare_crop(
            hand.frame,
            com,
            hand.cube_mm,
            self.camera,
            window=hand.window,
            image_size=self.image_size,
            label_size=self.label_size,
            augmentation=augmentation,
        )
        return crop, uvd

    def line(self, index):
        """Return the IndexLine of frame `index`. Raises FrameError where the line names no frame.

        The prefix of its path up to the data set's own folder is not trusted.
        """
        path_text, suffix, numbers = self.lines[index].rpartition(self.suffix)
        parts = (path_text + suffix).replace("\\", "/").split("/")[-self.path_parts :]
        if not suffix or ".." in parts:
            wrong = "leads out of the data set's folder" if suffix else f"names no {self.suffix} file"
            raise FrameError(f"{self.root / self.index_name()} line {index + 1}", wrong)
        return IndexLine(self.frames_folder().joinpath(*parts), numbers, line_key("/".join(parts) + numbers))

    def frames_folder(self):
        """Return the folder that the paths of index lines start from."""
        return self.root

    def frame_path(self, index):
        """Return where frame `index` lies. Raises FrameError where its index line names none."""
        return self.line(index).path

    def load(self, line):
        """Return the HandFrame of an IndexLine, from the crop cache where there is one, else from the files.

        Raises FrameError, and ValueError where a centre or a crop is impossible.
        """
        cached = self.cache.read(line, self.frame_cube_mm(line)) if self.cache else None
        if cached is not None and (self.test_only or cached.joints_uvd is not None):
            return cached
        hand = self.locate(line)
        return hand if self.test_only else hand._replace(joints_uvd=self.joints_uvd(line))

    def locate(self, line):
        """Return the HandFrame of an IndexLine without its labels; raises what `load` raises."""
        frame, cube_mm = self.read(line), self.frame_cube_mm(line)
        if self.margin_mm is None:
            return HandFrame(frame, center_of_mass(frame), cube_mm)
        center_uvd = self.center_uvd(line)
        window = window_around(center_uvd, cube_mm - self.margin_mm, self.camera)
        # As in the published programs, which take twice the principal point for the picture's size.
        window = window.intersect(Rect(0, 0, int(2 * self.camera.u0), int(2 * self.camera.v0)))
        return HandFrame(frame, center_uvd, cube_mm, window)

    def frame_cube_mm(self, line):
        """Return half the edge of the cube around the hand of a frame, mm."""
        return self.cube_mm

    def read(self, line):
        """Decode the frame of an IndexLine to a Frame in mm. Raises FrameError."""
        depth = read_png(line.path, self.picture_px)
        if depth.dtype != np.uint16 or depth.ndim != 2:
            raise FrameError(line.path, f"expected a 16-bit depth picture, found {depth.dtype} {depth.shape}")
        return Frame(depth)

    def joints(self, line):
        """Return the labels of an IndexLine, [J, 3], uvd or (MSRA, HAND17) xyz in mm. Raises FrameError."""
        return parse_numbers(line.numbers, 3 * self.joint_number, line.path, "the label").reshape(-1, 3)

    def joints_uvd(self, line):
        """Return the labels of an IndexLine, [J, 3], uvd. Raises FrameError."""
        joints = self.joints(line)
        if self.labels_frame == "uvd":
            return joints
        if (joints[:, 2] <= 0).any():
            raise FrameError(line.path, "the label has a joint behind the camera")
        return self.xyz2uvd(joints)

    @cached_property
    def centers(self):
        """The LineFiles that hold the centres, opened when they are asked for."""
        return open_centers(self)

    def center_names(self):
        """Return the names of the files that hold this split's centres."""
        return [f"{self.center_prefix}_center_{'train' if self.trains else 'test'}.txt"]

    def center_uvd(self, line):
        """Return the centre file's uvd for an IndexLine. Raises FrameError where it has none."""
        number = self.center_line(line)
        if number is None or not 0 <= number < len(self.centers[0]):
            raise FrameError(line.path, "the centre file has no line for this frame")
        return parse_center(self.centers[0][number], line.path)

    def center_line(self, line):
        """Return the zero-based line of the centre file for an IndexLine; None where it has none."""
        return frame_number(line.path) - 1

    def xyz2uvd(self, xyz):
        """Project camera-frame mm [..., 3] to (column px, row px, depth mm)."""
        return xyz2uvd(xyz, self.camera)

    def uvd2xyz(self, uvd):
        """Back-project (column px, row px, depth mm) [..., 3] to camera-frame mm."""
        return uvd2xyz(uvd, self.camera)

    def recover_uvd(self, uvd, batch):
        """Turn normalised joints [B, J, 3] of a batch into (column px, row px, depth mm) of the frames."""
        return recover_uvd(uvd, batch.box_size, batch.cube_size, batch.com)


def open_index(dataset):
    """Return the lines of a split's index. Raises UserError where it is missing."""
    path = dataset.root / dataset.index_name()
    if not path.is_file():
        raise UserError(f"{path} not found: run `{check_command(dataset.name, dataset.root)}` first")
    return LineFile(path, skip_blank=True)


def frame_number(path):
    """Return the number in a frame's name. Raises FrameError where there is none."""
    digits = path.stem.rpartition("_")[2].lstrip("D")
    if not digits.isdecimal():
        raise FrameError(path, "the name holds no frame number")
    return int(digits)


def parse_center(text, path):
    """Return the centre (uvd) that a line of a centre file gives the frame at `path`. Raises FrameError."""
    if text == "invalid":
        raise FrameError(path, "no hand was found in it, says the centre file")
    center_uvd = parse_numbers(text, 3, path, "the centre")
    if center_uvd[2] < 1e-3 or max(map(abs, center_uvd.tolist())) > MAX_CENTER:
        raise FrameError(path, "the centre is impossible: {:g} {:g} {:g}".format(*center_uvd))
    return center_uvd


def computed_name(name):
    """Return the name of the file that check_dataset computes where a centre file is missing."""
    return name.replace(".txt", "_computed.txt")


def open_centers(dataset):
    """Return a split's LineFiles of `center_names`: those that others distribute, or else computed ones.

    Empty for a data set without centre files. Raises UserError where there are neither.
    """
    if dataset.margin_mm is None:
        return []
    names = dataset.center_names()
    for candidates in (names, [computed_name(name) for name in names]):
        if all((dataset.root / name).is_file() for name in candidates):
            return [LineFile(dataset.root / name) for name in candidates]
    missing = next(name for name in names if not (dataset.root / name).is_file())
    raise UserError(
        f"{dataset.root / missing} not found: put it there, or run "
        f"`{check_command(dataset.name, dataset.root)} --force`, which computes centres from the frames"
    )


class NYUDataset(HandDataset):
    """NYU Hand Pose (Tompson et al. 2014): camera 0, 14 of the 36 joints."""

    name = "NYU"
    camera, picture_px = PRESETS["NYU"].camera, PRESETS["NYU"].size_px
    cube_mm = 150.0
    margin_mm = 40.0
    joint_number = 14
    config = [[13, 10, 9, 8], [13, 1, 0], [13, 3, 2], [13, 5, 4], [13, 7, 6], [11, 13, 12]]
    center_prefix = "nyu"
    # The second test person, whose hand is smaller, starts at 2441; the published programs are
    # one frame late, and parity needs that.
    late_after, late_cube_mm = 2441, 125.0

    def frame_cube_mm(self, line):
        """Return half the cube's edge, mm: smaller for the second test person."""
        late = self.split != "train" and frame_number(line.path) > self.late_after
        return self.late_cube_mm if late else self.cube_mm

    def read(self, line):
        """Decode the frame of an IndexLine to a Frame in mm: 256 * green + blue. Raises FrameError."""
        image = read_png(line.path, self.picture_px)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise FrameError(line.path, f"expected an 8-bit RGB picture, found {image.dtype} {image.shape}")
        return Frame(unpack_rgb(image))


class ICVLDataset(HandDataset):
    """ICVL (Tang et al. 2014): 16 joints, the unrotated training frames."""

    name = "ICVL"
    camera, picture_px = PRESETS["ICVL"].camera, PRESETS["ICVL"].size_px
    cube_mm = 125.0
    margin_mm = 30.0
    joint_number = 16
    config = [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9], [0, 10, 11, 12], [0, 13, 14, 15]]
    path_parts = 4
    center_prefix = "icvl"
    first_sequence = 702

    def center_names(self):
        """Return the centre file's name; in training that of the list of their frames too."""
        return super().center_names() + ["icvl_train_list.txt"] * self.trains

    def center_line(self, line):
        """Return the centre's line: listed by path in training, by image number in the two test sequences."""
        if self.trains:
            return self._train_lines.get("/".join(line.path.parts[-2:]))
        late = line.path.parent.name == "test_seq_2"
        return frame_number(line.path) + (self.first_sequence if late else 0)

    @cached_property
    def _train_lines(self):
        lines = {}
        for number, path in enumerate(self.centers[1]):
            lines.setdefault(path.replace("\\", "/"), number)
        return lines


class MSRADataset(HandDataset):
    """MSRA (Sun et al. 2015): nine subjects, one held out; 21 joints; the hand already cut out."""

    name = "MSRA"
    camera, picture_px = PRESETS["MSRA"].camera, PRESETS["MSRA"].size_px
    cube_mm = 125.0
    joint_number = 21
    config = [[0, 17, 18, 19, 20], [0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9, 10, 11, 12], [0, 13, 14, 15, 16]]
    labels_frame = "xyz"
    suffix = ".bin"
    path_parts = 3
    subjects = 9

    def __init__(self, *, subject=0, **options):
        if not (isinstance(subject, int) and 0 <= subject < self.subjects):
            raise UserError(f"subject must be 0 to {self.subjects - 1}, not {subject!r}")
        self.subject = subject
        super().__init__(**options)

    def index_name(self):
        """Return the name of this split's index file for the held-out subject."""
        return f"{self.split}_{self.subject}.txt"

    def cache_name(self):
        """Return the name of the one crop cache of all subjects, which every fold shares."""
        return "frames.cache"

    def read(self, line):
        """Return the rectangle of the picture that the file of an IndexLine holds. Raises FrameError."""
        return read_bin(line.path, self.picture_px)


class HAND17Dataset(HandDataset):
    """HANDS 2017 frame-based task (Yuan et al. 2017): 21 joints, no test labels."""

    name = "HAND17"
    camera, picture_px = PRESETS["HAND17"].camera, PRESETS["HAND17"].size_px
    cube_mm = 150.0
    margin_mm = 40.0
    joint_number = 21
    config = [[0, 1, 6, 7, 8], [0, 2, 9, 10, 11], [0, 3, 12, 13, 14], [0, 4, 15, 16, 17], [0, 5, 18, 19, 20]]
    labels_frame = "xyz"
    center_prefix = "hands17"
    path_parts = 1
    process_modes = ("uvd", "bb")

    def __init__(self, **options):
        super().__init__(**options)
        if self.split == "test" and not self.test_only:
            raise UserError(
                "HAND17's test frames have no labels: construct the test split with test_only=True"
            )

    @property
    def trains(self):
        """Whether the frames are those that were recorded for training: validation frames too."""
        return self.split != "test"

    def frames_folder(self):
        """Return the folder of the split's frames, whose index lines hold bare names."""
        return self.root / ("frame" if self.split == "test" else "training") / "images"

    def locate(self, line):
        """Return the HandFrame; in `bb` mode of the centre of mass inside the bounding box."""
        if self.process_mode == "uvd":
            return super().locate(line)
        bbox = parse_numbers(line.numbers, 4, line.path, "the bounding box")
        frame = cut_bounding_box(self.read(line), bbox)
        return HandFrame(frame, center_of_mass(frame), self.cube_mm)


DATASETS = {cls.name: cls for cls in (NYUDataset, ICVLDataset, MSRADataset, HAND17Dataset)}


def test_labels_uvd(name, data_dir=None, subject=None):
    """Return the labels [N, J, 3] of a data set's test split, uvd, in the order of its result file.

    MSRA without a `subject` is all nine in order. Raises UserError where the index is missing, a
    label is damaged, or (HAND17) the data set has no test labels.
    """
    if name == "HAND17":
        raise UserError("HAND17's test frames have no labels: give a file with --labels")
    folds = [{}]
    if name == "MSRA":
        folds = [{"subject": s} for s in (range(MSRADataset.subjects) if subject is None else [subject])]
    labels = []
    for fold in folds:
        dataset = DATASETS[name](path=data_dir, dataset="test", test_only=True, **fold)
        labels += [dataset.joints_uvd(dataset.line(index)) for index in range(len(dataset))]
    return np.stack(labels)
