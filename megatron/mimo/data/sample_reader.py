"""From a raw record to a sample, or to the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample, BadSamplePolicy
from megatron.mimo.data.chat import Chat
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats import RawRecord, ReadingOptions, read_record
from megatron.mimo.data.sample import Sample

__all__ = ["SampleReader"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleReader:
    """Reads records; a function of the record alone, in whatever process it is called.

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

    def __call__(self, record: RawRecord) -> Sample | BadSample:
        """The sample of a record; a ``BadSample`` where the policy is to skip.

        Raises:
            InputError: the policy is to stop; the message names file, place and medium.
        """
        try:
            conversation = read_record(record, self.options)
            assert isinstance(conversation, Conversation), "no format gives documents yet"
            sample = self.chat.sample(conversation)
        except InputError as error:
            if self.policy.on_bad_sample == "stop":
                raise
            return self._bad(record, "bad", str(error))
        length = len(sample.token_ids)
        if length <= self.seq_length:
            return sample
        reason = (
            f"{sample.name}: {length} tokens, {length - self.seq_length} more than --seq-length "
            f"{self.seq_length}; raise it, shorten the conversation, or leave such ones out with "
            "--on-too-long skip (media are never cut)"
        )
        if self.policy.on_too_long == "stop":
            raise InputError(reason)
        return self._bad(record, "too long", reason)

    @staticmethod
    def _bad(record: RawRecord, kind: str, reason: str) -> BadSample:
        return BadSample(
            file=str(record.file), place=record.place, medium=None, kind=kind, reason=reason
        )
