"""linspec as a model of lm-eval (Gao et al., the evaluation harness of EleutherAI).

    import linspec.integrations.lm_eval        # makes model="linspec" known to lm-eval
    lm_eval.simple_evaluate(model="linspec", model_args={"model": "smollm2"}, tasks=["arc_easy"])

or `linspec eval task smollm2 arc_easy`. Options of a task are scored in batches by the full form; answers
are written by the engine, so drafts make them come sooner and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from linspec.decoding.sampling import SamplingParams
from linspec.errors import ConfigError, NotFinite
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.train.data import end_of_text
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.sizes import check_size

# tokens of an answer where a task does not say
ANSWER_TOKENS = 256
# tokens of a batch that is scored, and logits that exist at once
_BATCH_TOKENS = 8192
_LOGITS = 2**24
# requests whose answers are written together: the engine queues what has no slot
_TOGETHER = 64
# the names that tasks use, and those of SamplingParams
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_KNOWN = (*_SAMPLING, *_LENGTHS, "until", "do_sample")

# what lm-eval hands over: (what a cache knows it by, tokens that are given, tokens that are scored)
Scored = tuple[Any, list[int], list[int]]


@register_model("linspec")
class LinspecLM(TemplateLM):
    """A decoder that predicts text token by token.

    Args:
        model: a name, a directory or a GGUF file, as LLM takes it.
        batch_size: sequences that are decoded at a time.
        max_length: most tokens of a prompt and its answer; None for what the model was made for.
        options: of LLM: drafter, policy, quantize, dtype, device, kv_cache_dtype, attention.

    Raises:
        ConfigError: the model does not predict text token by token, or an option breaks a rule.
        CheckpointError: the model cannot be read.
    """

    def __init__(
        self,
        model: str | Path = "embedded-aug",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_length is not None:
            check_size("max_length", max_length, least=2)
        slots = 8 if batch_size == "auto" else int(batch_size)
        self.llm = LLM(model, max_batch=min(slots, max_batch_size or slots), **options)
        if not isinstance(self.llm.model, Decoder) or not self.llm.model.config.causal:
            raise ConfigError(
                f"{model} is no causal decoder; lm-eval asks for one that continues text"
            )
        self.decoder, self.tokenizer = self.llm.model, self.llm.tokenizer
        self.max_length = min(max_length or 2**31, self.decoder.config.max_positions)

    # ---- what lm-eval asks about

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return end_of_text(self.tokenizer, self.decoder.config)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """What cached prompts are kept under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; None adds a start token where the tokenizer does."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        found: list[int] = self.tokenizer(string, verbose=False, **special)["input_ids"]
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the template of the model writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    # ---- scores

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        # equal lengths side by side: little padding
        order = sorted(
            range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
        )
        with tqdm(total=len(order), desc="scoring", disable=disable_tqdm) as progress:
            for batch in self._batches(requests, order):
                for i, answer in zip(
                    batch, self._scores([requests[i] for i in batch]), strict=True
                ):
                    found[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                progress.update(len(batch))
        return [found[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Scored], order: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in order:
            longest = self._cut(requests[batch[0] if batch else i])
            if batch and (len(batch) + 1) * len(longest) > _BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _cut(self, request: Scored) -> list[int]:
        """The tokens of a request; of one that is too long, those at its end."""
        _, given, scored = request
        return [*given, *scored][-(self.max_length + 1) :]

    def _scores(self, batch: Sequence[Scored]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of what each request scores, and whether greedy decoding would write it."""
        texts = [self._cut(request) for request in batch]
        longest = max(map(len, texts)) - 1
        # causal: what stands behind a text cannot change its logits
        ids = torch.tensor([[*text[:-1], *[0] * (longest + 1 - len(text))] for text in texts])
        hidden = self.decoder.hidden(ids.to(self.decoder.device))
        for row, (text, (_, _, scored)) in enumerate(zip(texts, batch, strict=True)):
            count = min(len(scored), len(text) - 1)
            states = hidden[row, len(text) - 1 - count : len(text) - 1]
            yield self._score(states, torch.tensor(text[-count:], device=states.device))

    def _score(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[float, bool]:
        total, same = 0.0, True
        size = max(1, _LOGITS // self.decoder.config.vocab_size)
        for part, wanted in zip(states.split(size), labels.split(size), strict=True):
            logits = self.decoder.head(part).float()
            picked = logits.log_softmax(-1).gather(1, wanted[:, None])
            total += float(picked.double().sum())
            same = same and bool((logits.argmax(-1) == wanted).all())
        if total != total:
            raise NotFinite("the logits of a scored text")
        return total, same

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows of `max_length`."""
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pieces = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    # ---- answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text behind each context, up to what a task says ends it."""
        texts: list[str] = []
        with tqdm(total=len(requests), desc="answering", disable=disable_tqdm) as progress:
            for begin in range(0, len(requests), _TOGETHER):
                part = requests[begin : begin + _TOGETHER]
                asked = [self._asked(*request.args) for request in part]
                prompts, params = zip(*asked, strict=True)
                for request, done in zip(part, self.llm.generate(prompts, params), strict=True):
                    texts.append(done.text)
                    self.cache_hook.add_partial("generate_until", request.args, done.text)
                progress.update(len(part))
        return texts

    def _asked(
        self, context: str, settings: dict[str, Any]
    ) -> tuple[tuple[int, ...], SamplingParams]:
        params = sampling(settings)
        room = self.max_length - params.max_tokens
        if room < 1:
            raise ConfigError(
                f"a task asks for answers of {params.max_tokens} tokens, and this model takes "
                f"{self.max_length} with the question; set max_gen_toks lower"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return tuple(ids[-room:]), params


def sampling(settings: dict[str, Any]) -> SamplingParams:
    """What a task's generation settings mean; raises ConfigError for one that linspec does not know."""
    strange = next((name for name in settings if name not in _KNOWN), None)
    if strange is not None:
        raise ConfigError(
            f"linspec does not know the generation setting {shown(repr(strange))} of this task; known: "
            f"{', '.join(_KNOWN)}{did_you_mean(strange, _KNOWN)}"
        )
    until = settings.get("until") or []
    given = {ours: settings[name] for name, ours in _SAMPLING.items() if name in settings}
    if not settings.get("do_sample", given.get("temperature", 0) > 0):
        given["temperature"] = 0.0
    length = next((settings[name] for name in _LENGTHS if name in settings), ANSWER_TOKENS)
    stops = until if isinstance(until, str) else tuple(text for text in until if text)
    return SamplingParams(max_tokens=length, stop=stops, **given)


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    include: str | Path | None = None,
    chat: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`tasks`: an entry for each metric of each task; raises ConfigError for an unknown task.

    limit: most questions of a task. fewshot: worked examples before each. include: a folder with tasks
    of your own. chat: write questions as the chat template does. options: of LinspecLM.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"lm-eval has no task {shown(repr(name))}{did_you_mean(name, manager.all_tasks)}; "
                "`lm-eval ls tasks` lists them, and --include names a folder with your own"
            )
    found = simple_evaluate(
        model=LinspecLM(model, **options),
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {"model": str(model), "tasks": list(_metrics(found["results"]))}


def _metrics(results: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task, said in results.items():
        # a metric is called NAME,FILTER
        for name, value in said.items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = said.get(f"{metric}_stderr,{kind}")
                yield {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": value,
                    "stderr": error,
                }
