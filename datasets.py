"""The four depth-hand data sets: loaders that crop around the hand centre."""

import random
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from frames import files, transforms
from frames.cache import cache_of, line_key
from frames.cameras import PRESETS
from frames.centers import open_centers, read_center
from frames.files import FrameError, IndexLine, LineFile
from frames.samples import LABEL_SIZE, HandFrame, Sample, move_hand, prepare_crop, to_tensor
from frames.transforms import ROTATION_DEG, Augmentation, Camera, Frame, Rect
from model import on_grid, spatial_form
from utils import UserError, check_command, require_file

PLAIN = Augmentation()


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
    center_prefix = ""  # what the names of its centre files begin with
    camera = Camera(1, 1, 0, 0)
    picture_px = (0, 0)  # width, height
    cube_mm = 0.0  # half the edge
    margin_mm = None  # how much narrower than the cube the window before the crop is; None: there is none
    joint_number = 0
    config = []  # joint indices from the palm outwards: thumb, index, middle, ring, little, palm
    labels_frame = "uvd"
    suffix = ".png"
    frames_folder = {}  # by split, where the paths of index lines start below the data set's folder
    path_parts = 2  # of an index line's path, those below that folder
    process_modes = ("uvd",)
    test_labels = True  # whether test frames have any
    fold = ""  # what the names of its index files end in
    training_splits = ("train",)  # whose frames were recorded for training, and have their centres there

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
        if dataset == "test" and not (test_only or self.test_labels):
            raise UserError(f"{self.name}'s test frames have no labels: construct it with test_only=True")
        given = zip((fx, fy, halfu, halfv), self.camera)
        self.camera = Camera(*(default if value is None else value for value, default in given))
        self.root = Path("Data", self.name) if path is None else Path(path)
        self.folder = self.root / self.frames_folder.get(dataset, "")
        self.sigmoid, self.kernel_size = sigmoid, kernel_size
        self.image_size, self.label_size = image_size, label_size
        self.sizes = dict(image_size=image_size, label_size=label_size)
        self.test_only, self.targets = test_only, targets
        using = dict(rotation=using_rotation, scale=using_scale, shift=using_shift, flip=using_flip)
        more = dict(shift_mm=shift_mm, erasing=erasing, noise_mm=noise_mm)
        self.augments = any(using.values()) or any(more.values())
        self.drawn = {part: bool(on) for part, on in using.items()} | more | {"rotation_deg": rotation_deg}
        self.cube_mm = float(self.cube_mm if cube_size is None else cube_size)
        self.joint_number = self.joint_number if joint_number is None else joint_number
        self.split, self.process_mode = dataset, process_mode
        self.trains = dataset in self.training_splits
        index = self.root / self.index_name()
        if lines is None:
            require_file(index, f"run `{check_command(self.name, self.root)}` first")
        self.lines = LineFile(index, skip_blank=True) if lines is None else lines
        self.cache = cache_of(self) if use_cache and lines is None and process_mode == "uvd" else None

    def index_name(self):
        """Return the name of this split's index file."""
        return f"{self.split}{self.fold}.txt"

    def cache_name(self):
        """Return the name of the crop cache that holds this split's frames."""
        return f"{'train' if self.trains else 'test'}.cache"

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
        return self.sample(index, transforms.draw_augmentation(random.Random(seed), **self.drawn))

    def sample(self, index, augmentation=PLAIN):
        """Return the Sample (UnlabelledSample with `test_only`) of frame `index` for one Augmentation.

        The plain sample is returned where an augmented joint leaves the heatmap grid, or too little of the
        hand is left in the crop. Raises FrameError where the frame cannot be used.
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
            box_px = transforms.box_size_px(d, hand.cube_mm, self.camera)
            joints = transforms.joints_to_crop(hand.joints_uvd, com, box_px, self.image_size)
            uvd = transforms.augment_joints(joints, augmentation)
            uvd = uvd / (self.image_size - 1, self.image_size - 1, hand.cube_mm)
            # Whether a frame is usable must not depend on the network's size.
            grid = LABEL_SIZE if augmentation == PLAIN else self.label_size
            if not on_grid(uvd[:, :2], grid).all():
                raise ValueError("a joint lies outside the heatmap grid")
            uvd = to_tensor(uvd)
        how = dict(window=hand.window, augmentation=augmentation, **self.sizes)
        return prepare_crop(hand.frame, com, hand.cube_mm, self.camera, **how), uvd

    def line(self, index):
        """Return the IndexLine of frame `index`. Raises FrameError where the line names no frame.

        The prefix of its path up to the data set's own folder is not trusted.
        """
        path_text, suffix, numbers = self.lines[index].rpartition(self.suffix)
        parts = (path_text + suffix).replace("\\", "/").split("/")[-self.path_parts :]
        if not suffix or ".." in parts:
            wrong = "leads out of the data set's folder" if suffix else f"names no {self.suffix} file"
            raise FrameError(f"{self.root / self.index_name()} line {index + 1}", wrong)
        return IndexLine(self.folder.joinpath(*parts), numbers, line_key("/".join(parts) + numbers))

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
            return HandFrame(frame, transforms.center_of_mass(frame), cube_mm)
        center_uvd = self.center_uvd(line)
        window = transforms.window_around(center_uvd, cube_mm - self.margin_mm, self.camera)
        # As in the published programs, which take twice the principal point for the picture's size.
        window = window.intersect(Rect(0, 0, int(2 * self.camera.u0), int(2 * self.camera.v0)))
        return HandFrame(frame, center_uvd, cube_mm, window)

    def frame_cube_mm(self, line):
        """Return half the edge of the cube around the hand of a frame, mm."""
        return self.cube_mm

    def read(self, line):
        """Decode the frame of an IndexLine to a Frame in mm. Raises FrameError."""
        depth = files.read_png(line.path, self.picture_px)
        if depth.dtype != np.uint16 or depth.ndim != 2:
            raise FrameError(line.path, f"expected a 16-bit depth picture, found {depth.dtype} {depth.shape}")
        return Frame(depth)

    def joints(self, line):
        """Return the labels of an IndexLine, [J, 3], uvd or (MSRA, HAND17) xyz in mm. Raises FrameError."""
        return files.parse_numbers(line.numbers, 3 * self.joint_number, line.path, "the label").reshape(-1, 3)

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
        return read_center(self.centers[0], self.center_line(line), line.path)

    def center_line(self, line):
        """Return the zero-based line of the centre file for an IndexLine; None where it has none."""
        return files.frame_number(line.path) - 1

    def xyz2uvd(self, xyz):
        """Project camera-frame mm [..., 3] to (column px, row px, depth mm)."""
        return transforms.xyz2uvd(xyz, self.camera)

    def uvd2xyz(self, uvd):
        """Back-project (column px, row px, depth mm) [..., 3] to camera-frame mm."""
        return transforms.uvd2xyz(uvd, self.camera)

    def recover_uvd(self, uvd, batch):
        """Turn normalised joints [B, J, 3] of a batch into (column px, row px, depth mm) of the frames."""
        return transforms.recover_uvd(uvd, batch.box_size, batch.cube_size, batch.com)


class NYUDataset(HandDataset):
    """NYU Hand Pose (Tompson et al. 2014): camera 0, 14 of the 36 joints."""

    name = "NYU"
    camera, picture_px = PRESETS["NYU"].camera, PRESETS["NYU"].size_px
    cube_mm = 150.0
    margin_mm = 40.0
    joint_number = 14
    config = [[13, 10, 9, 8], [13, 1, 0], [13, 3, 2], [13, 5, 4], [13, 7, 6], [11, 13, 12]]
    center_prefix = "nyu"
    # The second test person, whose hand is smaller, starts at frame 2441; the published programs make the
    # cube smaller from 2442 on, and parity needs that.
    late_after, late_cube_mm = 2441, 125.0

    def frame_cube_mm(self, line):
        """Return half the cube's edge, mm: smaller for the second test person."""
        late = self.split != "train" and files.frame_number(line.path) > self.late_after
        return self.late_cube_mm if late else self.cube_mm

    def read(self, line):
        """Decode the frame of an IndexLine to a Frame in mm: 256 * green + blue. Raises FrameError."""
        image = files.read_png(line.path, self.picture_px)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise FrameError(line.path, f"expected an 8-bit RGB picture, found {image.dtype} {image.shape}")
        return Frame(files.unpack_rgb(image))


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
        return files.frame_number(line.path) + (self.first_sequence if late else 0)

    @cached_property
    def _train_lines(self):
        numbered = [(path.replace("\\", "/"), number) for number, path in enumerate(self.centers[1])]
        return dict(reversed(numbered))  # of a path that occurs twice, the first line


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
    gestures = "1 2 3 4 5 6 7 8 9 I IP L MP RP T TIP Y".split()

    def __init__(self, *, subject=0, **options):
        if not (isinstance(subject, int) and 0 <= subject < self.subjects):
            raise UserError(f"subject must be 0 to {self.subjects - 1}, not {subject!r}")
        self.subject, self.fold = subject, f"_{subject}"
        super().__init__(**options)

    def cache_name(self):
        """Return the name of the one crop cache of all subjects, which every fold shares."""
        return "frames.cache"

    def read(self, line):
        """Return the rectangle of the picture that the file of an IndexLine holds. Raises FrameError."""
        return files.read_bin(line.path, self.picture_px)


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
    frames_folder = {"train": "training/images", "val": "training/images", "test": "frame/images"}
    path_parts = 1
    process_modes = ("uvd", "bb")
    test_labels = False
    training_splits = ("train", "val")

    def locate(self, line):
        """Return the HandFrame; in `bb` mode of the centre of mass inside the bounding box."""
        if self.process_mode == "uvd":
            return super().locate(line)
        bbox = files.parse_numbers(line.numbers, 4, line.path, "the bounding box")
        frame = transforms.cut_bounding_box(self.read(line), bbox)
        return HandFrame(frame, transforms.center_of_mass(frame), self.cube_mm)


DATASETS = {cls.name: cls for cls in (NYUDataset, ICVLDataset, MSRADataset, HAND17Dataset)}
