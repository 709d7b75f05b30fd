"""Ctrl-C and SIGTERM stop RL after the step that is being made, with a checkpoint; a second Ctrl-C
does not wait. An error in a step says which step it was, and where the last checkpoint is."""
import signal
import sys
import threading

from lab import runs


def wanted(config) -> bool:
    return True


class Extra:
    asked_to_stop = False

    def cold_start(self):
        try:
            super().cold_start()
        except FloatingPointError as error:
            sys.exit(f"train.py: cold start: {error}; there is no checkpoint yet")

    def rl(self):
        self.saved_step = self.progress["step"]
        self.handlers = {}              # those of the caller, which come back
        if threading.current_thread() is threading.main_thread():       # no other may catch signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.catch)
        try:
            super().rl()
        finally:
            self.stop_catching()

    def catch(self, number, frame):
        self.asked_to_stop = True
        self.stop_catching()

    def stop_catching(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def must_stop(self) -> bool:
        return self.asked_to_stop

    def state_dict(self):
        self.saved_step = self.progress["step"]
        return super().state_dict()

    def rl_step(self, step):
        """Between two steps everything is in order: here is the place to stop."""
        checkpoint = self.folder / "checkpoint.pt"
        if self.must_stop():
            runs.save(checkpoint, self.state_dict())
            print(f"stopped; to go on: python train.py --resume --out {self.folder}")
            sys.exit(130)
        try:
            return super().rl_step(step)
        except (FloatingPointError, ValueError) as error:       # the latter: a reward of NaN
            sys.exit(f"train.py: RL step {step}: {error}; {checkpoint} has the model as it was "
                     f"after step {self.saved_step}")
