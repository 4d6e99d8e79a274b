"""The four depth-hand data sets: loaders that crop around the hand centre."""

import random
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from frames.cache import file_digest, line_key, open_cache
from frames.cameras import PRESETS
from frames.files import FrameError, LineFile, parse_numbers, read_bin, read_png, unpack_rgb
from frames.samples import Sample, prepare_crop, to_tensor
from frames.transforms import (
    Augmentation,
    Camera,
    Frame,
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
from model import grid_position, on_grid, spatial_form
from utils import UserError, check_command

MIN_HAND_PIXELS = 10

# About the length of a finger: a label that far from all that was measured belongs to no hand here.
MAX_OFF_HAND_MM = 75

# A frame is judged on the published grid, so that its use does not depend on the network's size.
USABLE_GRID = 64

# So many frames, spread over an index, are compared with its cache when that is opened.
CHECKED_FRAMES = 64

# Far beyond any picture (px) or working distance (mm).
MAX_CENTER = 1e5


class HandDataset(Dataset):
    """A split of a data set; a subclass says what its files, camera and joints are.

    Keywords keep the published names: `fx, fy, halfu, halfv` are the camera (px), `path` the data
    set's own folder, `sigmoid` and `kernel_size` the heatmaps' blur, `image_size` and `label_size`
    the sizes of crop and maps (px), `cube_size` half the edge of the hand's cube (mm), `dataset`
    the split, `process_mode` `uvd` (centre file) or `bb` (bounding box; HAND17's test split).
    `test_only` drops the labels; `targets=False` leaves heatmaps and depthmaps empty, for a caller
    that makes them with `model.spatial_form`. `lines` replaces the index file. `use_cache=False`
    reads the frames' files also where a crop cache (cache.py) lies beside the index.

    Opens index and cache and no image. Raises UserError where the index is missing.
    """

    name = ""
    camera = Camera(1, 1, 0, 0)
    image_size_px = (0, 0)  # width, height
    cube_mm = 0.0
    margin_mm = None  # how much narrower than the cube the pre-crop is; None: there is none
    joint_number = 0
    config = []  # joint indices from the palm outwards: thumb, index, middle, ring, little, palm
    labels_frame = "uvd"
    suffix = ".png"
    path_parts = 2  # of an index line's path, those below the data set's folder
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
        self.using = dict(
            rotation=bool(using_rotation),
            scale=bool(using_scale),
            shift=bool(using_shift),
            flip=bool(using_flip),
        )
        self.cube_size = self.cube_mm if cube_size is None else cube_size
        self.joint_number = self.joint_number if joint_number is None else joint_number
        self.split, self.process_mode = dataset, process_mode
        # Of one sample's path, which is asked for several times and slow to build.
        self._latest_path = None, None
        self.lines = self._open_index() if lines is None else lines
        self.cache = self._open_cache() if use_cache and lines is None and process_mode == "uvd" else None

    def _open_index(self):
        path = self.root / self.index_name()
        if not path.is_file():
            raise UserError(f"{path} not found: run `{check_command(self.name, self.root)}` first")
        return LineFile(path, skip_blank=True)

    def index_name(self):
        """Return the name of this split's index file."""
        return f"{self.split}.txt"

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, key):
        """Return a sample; `key` is an index, or (index, seed) to fix the augmentation's draw.

        A bare index draws its seed from torch's global generator, which every DataLoader worker
        seeds anew each epoch.
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        if self.split != "train" or self.test_only or not any(self.using.values()):
            return self.sample(index)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        # After a decoding has emptied the processor's caches, NumPy's generator takes four times as long.
        return self.sample(index, draw_augmentation(random.Random(seed), **self.using))

    def sample(self, index, augmentation=None):
        """Return the Sample (UnlabelledSample with `test_only`) of frame `index` for one Augmentation.

        The plain sample is returned where an augmented joint leaves the heatmap grid.
        Raises FrameError where the frame cannot be used.
        """
        located, cube_mm = self.load(index), self.cube_of(index)
        if augmentation is not None and augmentation != Augmentation():
            sample = self._sample(index, located, cube_mm, augmentation)
            if sample is not None:
                return sample
        return self._sample(index, located, cube_mm, Augmentation())

    def _sample(self, index, located, cube_mm, augmentation):
        """Return a sample; None where an augmented joint leaves the heatmap grid."""
        frame, center_uvd, window, joints_uvd = located
        box_px = self._box(index, center_uvd, cube_mm)
        shift_u, shift_v = augmentation.shift_px
        com = np.array([int(center_uvd[0] + shift_u), int(center_uvd[1] + shift_v), center_uvd[2]])

        uvd = None
        if not self.test_only:
            uvd = augment_joints(joints_to_crop(joints_uvd, com, box_px, self.image_size), augmentation)
            uvd = uvd / (self.image_size - 1, self.image_size - 1, cube_mm)
            if augmentation != Augmentation() and not on_grid(uvd[:, :2], self.label_size).all():
                return None
            if augmentation == Augmentation() and not on_grid(uvd[:, :2], USABLE_GRID).all():
                raise FrameError(self.frame_path(index), "a joint lies outside the heatmap grid")

        known = prepare_crop(
            frame,
            com,
            cube_mm,
            self.camera,
            window=window,
            image_size=self.image_size,
            label_size=self.label_size,
            augmentation=augmentation,
        )
        return known if self.test_only else self._with_targets(known, to_tensor(uvd))

    def _with_targets(self, known, uvd):
        if not self.targets:
            return Sample(*known, uvd, torch.empty(0), torch.empty(0))
        heatmaps, depthmaps = spatial_form(
            uvd[None], known.label_img[None], known.mask[None], self.kernel_size, self.sigmoid
        )
        return Sample(*known, uvd, heatmaps[0], depthmaps[0])

    def _box(self, index, center_uvd, cube_mm):
        try:
            return box_size_px(center_uvd[2], cube_mm, self.camera)
        except ValueError as error:
            raise FrameError(self.frame_path(index), str(error)) from None

    def load(self, index):
        """Return what a sample is made of: frame, centre (uvd), window, labels [J, 3] uvd (test_only: None).

        From the crop cache where there is one, else from the files. Raises FrameError.
        """
        crop = self.cache.read(self.cache_key(index), self.frame_path(index)) if self.cache else None
        if crop is None or crop.joints_uvd is None and not self.test_only:
            return *self.locate(index), None if self.test_only else self.joints_uvd(index)
        return crop.frame, crop.center_uvd, None, crop.joints_uvd

    def cache_name(self):
        """Return the name of the crop cache that holds this split's frames."""
        return f"{'train' if self._trains() else 'test'}.cache"

    def cache_key(self, index):
        """Return the key of frame `index`: its index line without the prefix that is not trusted."""
        path_text, numbers = self._fields(index)
        return line_key("/".join(path_text.split("/")[-self.path_parts :]) + numbers)

    def cache_frames(self, indices):
        """Yield (cache key, path) of those frames whose index line names a file."""
        for index in indices:
            with suppress(FrameError):
                yield self.cache_key(index), self.frame_path(index)

    def cache_settings(self):
        """Return what a cache must have been made with to serve this split, as JSON holds it."""
        centers = [] if self.margin_mm is None else [file.path for file in self._center_files]
        return {
            "dataset": self.name,
            "camera": list(self.camera),
            "cube": float(self.cube_size),
            "margin": self.margin_mm,
            "joints": self.joint_number,
            "centre file": file_digest(centers),
        }

    def _open_cache(self):
        path = self.root / self.cache_name()
        if not path.is_file():
            return None
        spread = np.linspace(0, len(self) - 1, min(len(self), CHECKED_FRAMES), dtype=int).tolist()
        return open_cache(path, self.cache_settings(), self.cache_frames(spread))

    def locate(self, index):
        """Return a frame, its hand's centre (uvd) and the window (Rect or None) that is not zeroed."""
        frame = self.read(index)
        if self.margin_mm is None:
            return frame, self._center_of_mass(index, frame), None
        center_uvd = self.center_uvd(index)
        self._box(index, center_uvd, self.cube_of(index))
        return frame, center_uvd, window_around(center_uvd, self.cube_of(index) - self.margin_mm, self.camera)

    def _center_of_mass(self, index, frame):
        try:
            return center_of_mass(frame)
        except ValueError as error:
            raise FrameError(self.frame_path(index), str(error)) from None

    def refusal(self, index):
        """Return why frame `index` cannot be used, or None where it can."""
        try:
            sample = self.sample(index)
        except FrameError as error:
            return error.reason
        background = (sample.mask[0] == 0).numpy().astype(np.uint8)
        if background.size - background.sum() < MIN_HAND_PIXELS:
            return f"fewer than {MIN_HAND_PIXELS} hand pixels in the crop"
        if not self.test_only:
            places = grid_position(sample.uvd[:, :2], self.label_size).round().long()
            columns, rows = places.clamp(0, self.label_size - 1).T
            off_px = cv2.distanceTransform(background, cv2.DIST_L2, 5)[rows, columns].max()
            if off_px * 2 * self.cube_of(index) / (self.label_size - 1) > MAX_OFF_HAND_MM:
                return f"a joint lies outside the hand, over {MAX_OFF_HAND_MM} mm from every hand pixel"
        return None

    def frame_path(self, index):
        """Return where frame `index` lies; of the index line's path only the data set's part is used."""
        latest = self._latest_path
        if latest[0] != index:
            self._latest_path = latest = index, self._resolve(self._fields(index)[0])
        return latest[1]

    def _resolve(self, path_text):
        return self.root.joinpath(*path_text.split("/")[-self.path_parts :])

    def _fields(self, index):
        """Split an index line into its path and the text of its numbers."""
        path_text, suffix, numbers = self.lines[index].rpartition(self.suffix)
        if not suffix:
            raise FrameError(
                f"{self.root / self.index_name()} line {index + 1}", f"names no {self.suffix} file"
            )
        return path_text + suffix, numbers

    def joints(self, index):
        """Return the labels of frame `index`, [J, 3], uvd or (MSRA, HAND17) xyz in mm."""
        numbers = parse_numbers(
            self._fields(index)[1], 3 * self.joint_number, self.frame_path(index), "the label"
        )
        return numbers.reshape(-1, 3)

    def joints_uvd(self, index):
        """Return the labels of frame `index`, [J, 3], uvd."""
        joints = self.joints(index)
        if self.labels_frame == "uvd":
            return joints
        if (joints[:, 2] <= 0).any():
            raise FrameError(self.frame_path(index), "the label has a joint behind the camera")
        return self.xyz2uvd(joints)

    def cube_of(self, index):
        """Return half the edge of the cube around the hand of frame `index`, mm."""
        return float(self.cube_size)

    def read(self, index):
        """Decode frame `index` to a Frame in mm. Raises FrameError."""
        path = self.frame_path(index)
        return Frame(self._checked(path, self.decode(path)))

    def decode(self, path):
        """Return a frame's depth, uint16 [H, W] mm, as its file holds it."""
        return read_png(path)

    def _checked(self, path, depth):
        width, height = self.image_size_px
        if depth.dtype != np.uint16 or depth.ndim != 2:
            raise FrameError(path, f"expected a 16-bit depth picture, found {depth.dtype} {depth.shape}")
        if depth.shape != (height, width):
            raise FrameError(path, f"expected {width}x{height} px, found {depth.shape[1]}x{depth.shape[0]}")
        return depth

    def center_uvd(self, index):
        """Return the centre file's uvd for frame `index`. Raises FrameError where it has none."""
        frame, line = self.frame_path(index), self.center_line(index)
        if line is None or not 0 <= line < len(self._center_files[0]):
            raise FrameError(frame, "the centre file has no line for this frame")
        text = self._center_files[0][line]
        if text == "invalid":
            raise FrameError(frame, "no hand was found in it, says the centre file")
        center_uvd = parse_numbers(text, 3, frame, "the centre")
        if center_uvd[2] <= 0 or max(map(abs, center_uvd.tolist())) > MAX_CENTER:
            raise FrameError(frame, "the centre is impossible: {:g} {:g} {:g}".format(*center_uvd))
        return center_uvd

    def center_files(self, computed):
        """Return the files that give this split's centres: those that others distribute, or computed ones."""
        split = "train" if self._trains() else "test"
        return [self.root / f"{self.center_prefix}_center_{split}{'_computed' if computed else ''}.txt"]

    @cached_property
    def _center_files(self):
        for computed in (False, True):
            files = self.center_files(computed)
            if all(path.is_file() for path in files):
                return [LineFile(path) for path in files]
        missing = next(path for path in self.center_files(computed=False) if not path.is_file())
        raise UserError(
            f"{missing} not found: put it there, or run `{check_command(self.name, self.root)} --force`, "
            "which computes centres from the frames"
        )

    def _trains(self):
        return self.split == "train"

    def center_line(self, index):
        """Return the zero-based line of the centre file for frame `index`."""
        return self.number(index) - 1

    def number(self, index):
        """Return the number in the name of frame `index`."""
        path = self.frame_path(index)
        digits = path.stem.rpartition("_")[2].lstrip("D")
        if not digits.isdecimal():
            raise FrameError(path, "the name holds no frame number")
        return int(digits)

    def xyz2uvd(self, xyz):
        """Project camera-frame mm [..., 3] to (column px, row px, depth mm)."""
        return xyz2uvd(xyz, self.camera)

    def uvd2xyz(self, uvd):
        """Back-project (column px, row px, depth mm) [..., 3] to camera-frame mm."""
        return uvd2xyz(uvd, self.camera)

    def recover_uvd(self, uvd, batch):
        """Turn normalised joints [B, J, 3] of a batch into (column px, row px, depth mm) of the frames."""
        return recover_uvd(uvd, batch.box_size, batch.cube_size, batch.com)


class NYUDataset(HandDataset):
    """NYU Hand Pose (Tompson et al. 2014): camera 0, 14 of the 36 joints."""

    name = "NYU"
    camera, image_size_px = PRESETS["NYU"].camera, PRESETS["NYU"].size_px
    cube_mm = 150.0
    margin_mm = 40.0
    joint_number = 14
    config = [[13, 10, 9, 8], [13, 1, 0], [13, 3, 2], [13, 5, 4], [13, 7, 6], [11, 13, 12]]
    center_prefix = "nyu"
    # The second test person, whose hand is smaller, starts at 2441; the published programs are
    # one frame late, and parity needs that.
    late_after, late_cube_mm = 2441, 125.0

    def cube_of(self, index):
        """Return half the cube's edge, mm: smaller for the second test person."""
        late = self.split != "train" and self.number(index) > self.late_after
        return self.late_cube_mm if late else float(self.cube_size)

    def decode(self, path):
        """Return depth = 256 * green + blue as a uint16 [H, W] view of the decoded picture."""
        image = read_png(path)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise FrameError(path, f"expected an 8-bit RGB picture, found {image.dtype} {image.shape}")
        return unpack_rgb(image)


class ICVLDataset(HandDataset):
    """ICVL (Tang et al. 2014): 16 joints, the unrotated training frames."""

    name = "ICVL"
    camera, image_size_px = PRESETS["ICVL"].camera, PRESETS["ICVL"].size_px
    cube_mm = 125.0
    margin_mm = 30.0
    joint_number = 16
    config = [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9], [0, 10, 11, 12], [0, 13, 14, 15]]
    path_parts = 4
    center_prefix = "icvl"
    first_sequence = 702

    def center_line(self, index):
        """Return the centre's line: listed by path in training, by image number in the two test sequences."""
        if self._trains():
            return self._train_lines.get("/".join(self.frame_path(index).parts[-2:]))
        late = self.frame_path(index).parent.name == "test_seq_2"
        return self.number(index) + (self.first_sequence if late else 0)

    def center_files(self, computed):
        """Return the centre file; in training also the list of its frames, without which it is of no use."""
        files = super().center_files(computed)
        return files + [self.root / f"icvl_train_list{'_computed' if computed else ''}.txt"] * self._trains()

    @cached_property
    def _train_lines(self):
        lines = {}
        for number, path in enumerate(self._center_files[1]):
            lines.setdefault(path, number)
        return lines


class MSRADataset(HandDataset):
    """MSRA (Sun et al. 2015): nine subjects, one held out; 21 joints; the hand already cut out."""

    name = "MSRA"
    camera, image_size_px = PRESETS["MSRA"].camera, PRESETS["MSRA"].size_px
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
        return "frames.files.cache"

    def read(self, index):
        """Decode the rectangle that the file of frame `index` holds; the rest of the picture is zero."""
        return self.decode(self.frame_path(index))

    def decode(self, path):
        """Return the Frame that a file holds: a rectangle of the picture. Raises FrameError."""
        return read_bin(path, self.image_size_px)


class HAND17Dataset(HandDataset):
    """HANDS 2017 frame-based task (Yuan et al. 2017): 21 joints, no test labels."""

    name = "HAND17"
    camera, image_size_px = PRESETS["HAND17"].camera, PRESETS["HAND17"].size_px
    cube_mm = 150.0
    margin_mm = 40.0
    joint_number = 21
    config = [[0, 1, 6, 7, 8], [0, 2, 9, 10, 11], [0, 3, 12, 13, 14], [0, 4, 15, 16, 17], [0, 5, 18, 19, 20]]
    labels_frame = "xyz"
    center_prefix = "hands17"
    process_modes = ("uvd", "bb")

    def __init__(self, **options):
        super().__init__(**options)
        if self.split == "test" and not self.test_only:
            raise UserError(
                "HAND17's test frames have no labels: construct the test split with test_only=True"
            )

    def _resolve(self, path_text):
        return self.root.joinpath("frame" if self.split == "test" else "training", "images", path_text)

    def _trains(self):
        return self.split != "test"

    def locate(self, index):
        """Return frame, centre and window; in `bb` mode the centre of mass inside the bounding box."""
        if self.process_mode == "uvd":
            return super().locate(index)
        path = self.frame_path(index)
        bbox = parse_numbers(self._fields(index)[1], 4, path, "the bounding box")
        try:
            frame = cut_bounding_box(self.read(index), bbox)
            return frame, center_of_mass(frame), None
        except ValueError as error:
            raise FrameError(path, str(error)) from None


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
        frames = DATASETS[name](path=data_dir, dataset="test", test_only=True, **fold)
        labels += [frames.joints_uvd(index) for index in range(len(frames))]
    return np.stack(labels)
