"""Reads raw records: each gives a sample, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample, BadSamplePolicy
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.chat.shortening import shortened
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.formats import RawRecord, ReadingOptions, read_record
from megatron.mimo.data.media.source import MediumError
from megatron.mimo.data.reading.timed import Timed
from megatron.mimo.data.sample import Sample

__all__ = ["SampleReader"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleReader:
    """Reads records. The result depends on the record alone, in whatever process it is called.

    With a time limit, samples that hold media are read in a process of their own, one for each
    process that calls the reader, which is killed where a decoder does not come back.

    Attributes:
        chat: writes conversations as the model reads them.
        seq_length: tokens that a sample may have.
        options: how records are read.
        policy: what is done with those that are bad.
    """

    chat: Chat
    seq_length: int
    options: ReadingOptions = field(default_factory=ReadingOptions)
    policy: BadSamplePolicy = field(default_factory=BadSamplePolicy)
    _timed: list[Timed] = field(default_factory=list, init=False, repr=False)

    def __call__(self, record: RawRecord) -> Sample | BadSample:
        """The sample of a record; a ``BadSample`` where the policy is to skip.

        Raises:
            InputError: the policy is to stop; the message names file, place and medium.
        """
        try:
            item = read_record(record, self.options)
            sample = self._decoded(item)
        except InputError as error:
            if self.policy.on_bad_sample == "stop":
                raise
            medium = error.medium if isinstance(error, MediumError) else None
            return _bad(record, "bad", str(error), medium)
        except TimeoutError as error:
            if self.policy.on_bad_sample == "stop":
                raise InputError(str(error)) from None
            return _bad(record, "too slow", str(error))
        length = len(sample.token_ids)
        if length <= self.seq_length:
            return sample
        return self._too_long(record, item, length)

    def _decoded(self, item: Conversation | Document) -> Sample:
        seconds = self.policy.sample_timeout
        if seconds is None or not item.media:
            return self.chat.sample(item)
        if not self._timed:
            self._timed.append(Timed(self.chat.sample, seconds))
        sample: Sample = self._timed[0](item, item.name)
        return sample

    def _too_long(
        self, record: RawRecord, item: Conversation | Document, length: int
    ) -> Sample | BadSample:
        on_too_long = self.policy.on_too_long
        reason = (
            f"{item.name}: {length} tokens, {length - self.seq_length} more than --seq-length "
            f"{self.seq_length}; raise it, shorten the conversation, or leave such ones out with "
            "--on-too-long skip (media are never cut)"
        )
        if on_too_long == "stop":
            raise InputError(reason)
        if on_too_long != "skip":
            from_front = on_too_long == "cut-front"
            found = shortened(item, length, self.seq_length, self.chat, from_front=from_front)
            if found is not None:
                sample = self._decoded(found[0])
                if len(sample.token_ids) <= self.seq_length:
                    return replace(sample, cut_turns=found[1])
        return _bad(record, "too long", reason)


def _bad(record: RawRecord, kind: str, reason: str, medium: str | None = None) -> BadSample:
    return BadSample(
        file=str(record.file), place=record.place, medium=medium, kind=kind, reason=reason
    )
