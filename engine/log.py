"""What a run leaves to be looked at: logs/<run>/metrics.jsonl, TensorBoard's events and curves.png."""

import json
from pathlib import Path

from tqdm import tqdm

from utils import UserError, atomic_path


class Log:
    """A run's logs. A disk that is full or a folder that cannot be written costs them, not the run."""

    def __init__(self, run, provenance, records):
        """Open the logs of a run that has the epochs of `records` behind it.

        They are written anew: one that was killed after its state was saved left out the last.
        """
        # TensorBoard takes seconds to import, which no other script should pay.
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.provenance, self.board = Path("logs", run), provenance, None
        try:
            self.board = SummaryWriter(self.folder, purge_step=len(records) + 1)
        except OSError as error:
            tqdm.write(f"WARNING: no log for TensorBoard: {error}")
        if records:
            self._write(records)

    def add_epoch(self, records, picture=None):
        """Write the last of the epochs' records, and an RGB picture of a frame where there is one."""
        epoch = records[-1]["epoch"]
        self._write(records)
        for key in ("loss", "val_loss", "val_mm", "lr"):
            self._to_board("add_scalar", key, records[-1][key], epoch)
        if picture is not None:
            self._to_board("add_image", "true and predicted", picture, epoch, dataformats="HWC")

    def _write(self, records):
        """Write metrics.jsonl."""
        lines = [json.dumps(line) for line in (self.provenance, *records)]
        try:
            with atomic_path(self.folder / "metrics.jsonl") as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))
        except UserError as error:
            tqdm.write(f"WARNING: {error}. The next epoch tries again")

    def close(self):
        """End TensorBoard's log."""
        self._to_board("close")

    def _to_board(self, method, *values, **options):
        """Call a method of TensorBoard's writer; where its disk is full warn, and log no more there."""
        if self.board is None:
            return
        try:
            getattr(self.board, method)(*values, **options)
        except OSError as error:
            tqdm.write(f"WARNING: TensorBoard's log ends here: {error.strerror or error}")
            self.board = None

    def write_curves(self, records):
        """Write a figure of loss and validation error over the epochs."""
        # matplotlib takes a second to import, which no other step of a script should pay.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        epochs = [record["epoch"] for record in records]
        for axes, key, label in zip(
            figure.subplots(1, 2), ("loss", "val_mm"), ("training loss", "validation error, mm")
        ):
            axes.plot(epochs, [record[key] for record in records], marker=".")
            axes.set(xlabel="epoch", ylabel=label)
            axes.grid(alpha=0.3)
        try:
            with atomic_path(self.folder / "curves.png") as temporary:
                figure.savefig(temporary, dpi=110)
        except UserError as error:
            tqdm.write(f"WARNING: {error}")
