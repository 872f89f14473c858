"""Targets with the faults that the fuzzer is there to find."""

import os
import time


class Faulty:
    """Nothing is wrong with the first inputs; then something is."""

    allowed = (ValueError,)

    def corpus(self, folder):
        self.left = 3
        return [b"x" * 20]

    def attempt(self, data, folder):
        self.left -= 1
        if self.left < 0:
            self.fail()
        raise ValueError("one line")


class Crash(Faulty):
    def fail(self):
        os.abort()


class Hang(Faulty):
    def fail(self):
        time.sleep(300)


class Traceback(Faulty):
    def fail(self):
        raise KeyError("state")


class TwoLines(Faulty):
    def fail(self):
        raise ValueError("of two\nlines")


class Memory(Faulty):
    def fail(self):
        bytearray(1 << 40)


FAULTY = {"crash": Crash, "hang": Hang, "traceback": Traceback, "two lines": TwoLines, "memory": Memory}
