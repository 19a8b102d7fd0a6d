"""The page's words in English: the dictionary behind `wording.say`. A second language is a second dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# fmt: off
ENGLISH: Mapping[str, str] = MappingProxyType(
    {
        "tagline": "A small model of a large one, and what it cost.",
        "tab.compare": "Compare",
        "tab.compress": "Compress",
        "tab.runs": "Runs",
        "tab.methods": "Methods",
        # single words
        "run": "Run", "model": "Model", "recipe": "Recipe", "measurement": "Measurement", "result": "Result",
        "original": "Original", "original.title": "original",
        "difference": "Difference", "state": "State", "started": "Started", "took": "Took",
        "setting": "Setting", "meaning": "Meaning", "default": "Default", "values": "Values", "seed": "Seed",
        "step": "Step {number}", "yes": "yes", "no": "no", "best": "best", "copy": "Copy", "prompt": "Prompt",
        "mode": "Mode", "simulated": "simulated: no packed kernel here",
        # strip
        "strip.engine": "Engine", "strip.no_gpu": "no GPU", "strip.idle": "Nothing is running.",
        "strip.other": "Another visitor's run", "strip.queued": "{count} waiting", "eta": "about {span} left",
        # names of measurements
        "name.size.bytes": "Size on disk", "name.size.bits_per_weight": "Bits per weight",
        "name.size.sparsity": "Zeros", "name.size.parameters": "Parameters", "name.memory.loaded": "Memory, loaded",
        "name.memory.peak": "Memory, peak", "name.latency.ttft": "Time to first token",
        "name.latency.tpot": "Time per token", "name.throughput.b1": "Throughput, batch 1",
        "name.throughput.b8": "Throughput, batch 8", "name.perplexity": "Perplexity",
        "name.bits_per_byte": "Bits per byte", "name.accuracy": "Accuracy", "name.accuracy.task": "Accuracy, {task}",
        "name.kl": "KL to the original", "name.top1_agreement": "Same first choice", "name.flips": "Answers flipped",
        "short.latency.ttft": "first token", "short.latency.tpot": "each token",
        # units, ratios
        "unit.points": "points", "unit.tokens_per_second": "tokens/s", "ratio.faster": "{ratio} faster",
        "ratio.slower": "{ratio} slower", "ratio.smaller": "{ratio} smaller", "ratio.larger": "{ratio} larger",
        "sense.good": "better", "sense.same": "no clear difference", "sense.bad": "worse",
        # verdict
        "verdict.unknown": "Nothing that both have measured can be compared yet.",
        "verdict.same_size": "same size", "verdict.same_speed": "same speed",
        "verdict.less_memory": "{ratio} less memory", "verdict.more_memory": "{ratio} more memory",
        "verdict.perplexity": "perplexity {change}", "verdict.accuracy": "accuracy {points} points",
        "verdict.flips": "{count} of {total} answers flipped", "verdict.flips_share": "{share} of answers flipped",
        # status, time
        "status.queued": "queued", "status.running": "running", "status.succeeded": "succeeded",
        "status.failed": "failed", "status.cancelled": "cancelled", "status.interrupted": "interrupted",
        "status.refused": "refused", "when.now": "just now", "when.ago": "{span} ago",
        "phase.start": "Starting", "phase.checking": "Checking", "phase.loading": "Loading the model",
        "phase.saving": "Saving", "phase.verifying": "Reloading and checking", "phase.measuring": "Measuring",
        # compare
        "compare.a": "A, the original", "compare.b": "B, the small model",
        "compare.all": "All measurements",
        "compare.nothing": "Nothing to compare yet. The first runs are on their way.",
        "stored.label": "stored: {title}", "stored.chip": "stored", "stored.where": "Measured before on {machine}.",
        "live.chip": "measured here, now", "live.where": "Both were measured on this machine.",
        "mixed.chip": "mixed", "mixed.where": "One side is stored, from another machine: do not compare times.",
        "first.working": "Measuring the same two models on this machine: {done} of {total} done. "
        "The numbers will change by themselves.",
        "first.failed": "The live comparison stopped at {title}: {reason} The stored one is shown.",
        "panes.title": "The same prompt, side by side",
        "panes.about": "Two processes, one model each. Click a token to see what else both models had in mind.",
        "panes.run": "Run both", "panes.stop": "Stop", "panes.stopped": "Stopped.",
        "panes.loading": "Loading the model …",
        "panes.empty": "Nothing written yet: press Run both.", "panes.tokens": "{count} tokens",
        "panes.drift": "mean KL {kl} nats", "panes.first": "first after {span}",
        "panes.token": "{token}: this model gave it {probability}.",
        "panes.kl": "The small model's prediction moved by {kl} nats (KL).", "panes.split": "Here the texts part.",
        "panes.apart": "The texts have parted before this token; the other model saw other words here.",
        "mode.same": "Same text, drift shaded", "mode.free": "Free run", "mode.blind": "Blind vote",
        "kl.legend": "Same text: B reads A's words. How far its prediction moved, in nats:",
        "kl.1": "0.005 to 0.05", "kl.2": "0.05 to 0.5", "kl.3": "above 0.5",
        "prompt.default": "Once upon a time",
        "blind.left": "Left", "blind.right": "Right", "vote.left": "Left is better", "vote.tie": "Tie",
        "vote.right": "Right is better", "vote.ask": "Which text is better? You learn after your vote who wrote it.",
        "vote.reveal": "Left was {left}, right was {right}.",
        "vote.tally": "Your votes on this pair: {left} {left_count}, {right} {right_count}, ties {ties}.",
        # charts
        "charts.title": "What it cost, drawn", "charts.about": "Bars and whiskers are 95 % intervals.",
        "axis.cost": "Cost", "axis.quality": "Quality", "axis.higher": "higher is better",
        "axis.lower": "lower is better", "axis.ms": "milliseconds", "axis.percent": "right answers, %",
        "chart.pareto": "{cost} against {quality}", "chart.front": "Nothing better for less",
        "chart.on_front": "On the front", "chart.accuracy": "Accuracy by task",
        "chart.latency": "Latency: median, p95, p99", "chart.memory": "Disk and memory",
        "chart.numbers": "Numbers: {chart}",
        "live.summary": "{name}: now {last}, peak {peak}, over {span}",
        "series.memory.resident": "Memory of the run", "series.loss": "Training loss",
        "series.learning_rate": "Learning rate", "series.tokens_per_second": "Training tokens per second",
        "series.latency.tpot": "Time per token",
        # compress
        "compress.title": "Make a smaller one", "compress.about": "Model, recipe, check, start.",
        "compress.model": "Model", "compress.model.info": "demo, or the path of a model folder on this machine.",
        "compress.preset": "Recipe", "compress.steps": "Steps and their settings", "compress.add_what": "Another step",
        "compress.add": "Add step", "compress.yaml": "Paste a recipe", "compress.paste": "Recipe as YAML",
        "compress.read": "Use this recipe", "compress.original": "Measure the original too",
        "compress.original.info": "Only where it has not been measured here.", "compress.start": "Start",
        "compress.command": "As a command line", "compress.shell": "shell",
        "compress.link": "This recipe as a link", "preset.gptq4": "4-bit GPTQ",
        "preset.rtn8": "8-bit round-to-nearest", "preset.wanda24": "2:4 Wanda",
        "preset.half": "Half depth, distilled", "preset.chain": "Prune 50 % → distill → 4 bit",
        "step.up": "Earlier", "step.down": "Later", "step.remove": "Remove",
        "estimate.truth": "Expected {memory} and {seconds}; it took {peak} at most and {span}.",
        "fit.title": "Will it fit?", "fit.yes": "Fits", "fit.no": "Does not fit", "fit.of": "{total} of {free} free",
        "fit.weights": "weights", "fit.kv_cache": "KV cache", "fit.activations": "activations",
        "fit.runtime": "runtime", "fit.seconds": "Takes about {span}.",
        # runs
        "runs.title": "Your runs", "runs.about": "They go on without this page, and a reload finds them again.",
        "runs.filter": "Filter", "runs.none": "No runs yet. Start one on the Compress tab.",
        "runs.no_match": "No run matches the filter.", "runs.queued": "Waiting for its turn.", "runs.log": "Log",
        "runs.cancel": "Cancel", "runs.resume": "Resume", "runs.delete": "Delete",
        "runs.compare": "Compare",
        "file.recipe.yaml": "Recipe (YAML)", "file.measurements.csv": "Measurements (CSV)",
        "file.report.md": "Report (Markdown)",
        "diff.title": "Differences only", "diff.about": "Pick two to six results; what is equal is left out.",
        "diff.runs": "Results", "diff.pick": "Pick at least two.", "diff.same": "They differ in nothing.",
        # methods
        "methods.title": "Methods", "methods.about": "Each is one file; this page is made from them.",
        "methods.more": "How it works, and its settings", "methods.settings": "Settings of {title}",
        "family.quantize": "Quantize", "family.quantize.about": "Fewer bits for each weight.",
        "family.prune": "Prune", "family.prune.about": "Fewer weights that count.",
        "family.distill": "Distill", "family.distill.about": "A smaller network that learns from the large one.",
        "change.disk": "smaller on disk", "change.memory": "less memory", "change.latency": "faster",
        "change.none": "no smaller by itself",
        # settings of methods
        "field.bits": "Bits", "field.group_size": "Group size", "field.samples": "Calibration samples",
        "field.sequence_length": "Sequence length",
        # choices; Gradio takes a bare "blocks" for one of its own words
        "choice.blocks": "every k-th block", "choice.size": "a given size", "choice.current": "as it is",
        "choice.unstructured": "anywhere",
        # errors
        "error.title": "That did not work",
        "error.unforeseen": "Something went wrong on our side. It is in the server's log as {number}.",
        "error.no_visitor": "This page needs a cookie or a session to know your runs. Reload the page.",
        "error.not_local": "On a shared server only the bundled model and text can be used: set model, calibration "
        "and text to demo.",
        "error.stored_only": "{title} is stored as numbers only. Its live run makes the model; or start it on the "
        "Compress tab.",
        "error.no_artifact": "Run {run} has no model on this machine any more. Start its recipe again.",
        "error.empty_prompt": "The prompt is empty. Write a few words for the models to go on from.",
        "error.long_prompt": "The prompt has {count} characters; the limit is {limit}. Shorten it.",
        "error.no_ballot": "There is no open vote. Run both models in the blind mode first.",
        "error.axis": "Choose the axes from those that are offered.",
        "error.preset": "Choose a recipe from those that are offered.",
        "error.steps": "A recipe holds at most {limit} steps here. Remove one first.",
        "error.picks": "Pick at most {limit} results.",
        "error.long_link": "The recipe in the address is too long. Paste it on the Compress tab.",
    }
)
# fmt: on
