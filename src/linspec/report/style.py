"""The look of a report: one style sheet for phone and desk, light and dark."""

# ruff: noqa: E501
PALETTE = """\
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b1f24; --muted: #57606a; --grid: #d8dee4;
  --good: #1a7f37; --good-soft: #dafbe1; --bonus: #0a58c2; --bonus-soft: #ddeeff;
  --off: #6e7781; --off-line: #c3cad2;
  --series-1: #2467d1; --series-2: #bc4c00; --series-3: #1a7f37; --series-4: #8250df;
  --series-5: #9a6700;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --card: #161b22; --text: #e6edf3; --muted: #9da7b1; --grid: #30363d;
    --good: #4ac26b; --good-soft: #12381f; --bonus: #79b8ff; --bonus-soft: #11325a;
    --off: #8b949e; --off-line: #444c56;
    --series-1: #6cb0ff; --series-2: #ffa657; --series-3: #56d364; --series-4: #c297ff;
    --series-5: #e3b341;
  }
}
"""

STYLE = (
    PALETTE
    + """\
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 10px; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
h3 { font-size: 1rem; margin: 0 0 8px; }
p { margin: 0 0 12px; }
.headline { font-size: 1.15rem; max-width: 62em; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile, figure, .card, table { background: var(--card); border: 1px solid var(--grid); }
.tile, figure { border-radius: 10px; padding: 14px 16px; }
.tile span, .tile small { display: block; color: var(--muted); font-size: .86rem; }
.tile b { display: block; font-size: 1.65rem; line-height: 1.3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
tbody th { font-weight: 400; }
th:first-child { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
.plots, .rounds { display: grid; align-items: start; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure > svg { display: block; width: 100%; height: auto; max-width: 560px; }
figcaption { color: var(--muted); font-size: .88rem; margin-top: 6px; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.tree text, .sample, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tree text { font-size: 13px; fill: var(--text); white-space: pre; }
.tree rect { fill: var(--card); stroke: var(--off-line); }
.tree path { fill: none; stroke: var(--off-line); }
.tree path.on { stroke: var(--good); stroke-width: 2.5; }
.tree .root rect { stroke: var(--text); stroke-width: 2; }
.tree .accepted rect { fill: var(--good-soft); stroke: var(--good); stroke-width: 2; }
.tree .bonus rect { fill: var(--bonus-soft); stroke: var(--bonus); stroke-width: 2; stroke-dasharray: 5 3; }
.tree .rejected text { fill: var(--off); }
.legend { font-size: .88rem; }
.key { display: inline-block; padding: 1px 8px; margin: 0 6px 6px 0; border-radius: 5px; border: 1px solid var(--off-line); }
.key.root { border: 2px solid var(--text); }
.key.accepted { border: 2px solid var(--good); }
.key.bonus { border: 2px dashed var(--bonus); }
.key.prompt, .key.rejected { color: var(--off); }
.accepted { background: var(--good-soft); }
.bonus { background: var(--bonus-soft); }
.sample {
  background: var(--card); border: 1px solid var(--grid); border-radius: 10px; margin: 0;
  padding: 14px 16px; overflow-x: auto; font-size: .86rem; line-height: 1.55; tab-size: 4;
}
.sample .prompt { color: var(--muted); }
.sample .accepted { box-shadow: inset 0 -2px var(--good); }
.sample .bonus { box-shadow: inset 0 -1px var(--bonus); }
ul { margin: 0; padding-left: 1.2em; }
footer { margin-top: 36px; padding-top: 16px; border-top: 1px solid var(--grid); color: var(--muted); font-size: .88rem; }
footer dl { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 0; }
footer dt { display: inline; }
footer dt::after { content: ": "; }
footer dd { display: inline; margin: 0; color: var(--text); }
@media (max-width: 560px) {
  main { padding: 18px 12px 28px; }
  h1 { font-size: 1.4rem; }
  .headline { font-size: 1.05rem; }
  th, td { padding: 6px 8px; font-size: .9rem; }
  .tile b { font-size: 1.35rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
}
"""
)
