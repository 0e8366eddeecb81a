"""The style sheet of the HTML report; colours follow the light or dark setting of the reader."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #f6f7f9; --panel: #fff; --ink: #1c2430; --soft: #5d6878; --line: #dfe3e9;
  --accent: #2f6bd8; --warn: #b4690e;
  --k0: #3b76c4; --k1: #e8852b; --k2: #3f9b55; --k3: #cf4b4b; --k4: #8b66b8; --k5: #2a9d9d;
  --k6: #b58a1b; --k7: #cf6fa5; --k8: #8a93a0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #12161c; --panel: #1a2028; --ink: #e4e9f0; --soft: #96a2b3; --line: #2c343f;
    --accent: #6ea0f5; --warn: #e0a355;
    --k0: #6ea0e8; --k1: #f2a457; --k2: #66bd7b; --k3: #e87878; --k4: #b092db; --k5: #55c2c2;
    --k6: #d6b04c; --k7: #e394c0; --k8: #9aa4b2;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 2px 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 6px; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 16px 0 4px; }
p { margin: 0; }
.tool, .sub, .note, .label { color: var(--soft); font-size: 13px; }
.sub { font-size: 15px; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 18px; }
.cards { background: none; border: 0; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.card .value { font-size: 24px; font-weight: 650; line-height: 1.35; }
.card .note { overflow-wrap: anywhere; }
.warn { border-left: 4px solid var(--warn); }
.legend { margin: 10px 0 0; font-size: 13px; }
.key { margin-right: 16px; white-space: nowrap; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 6px; background: currentColor; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 11px; }
.chart .grid { stroke: var(--line); fill: none; }
.chart rect:hover { opacity: .6; }
.k0 { color: var(--k0); } .k1 { color: var(--k1); } .k2 { color: var(--k2); }
.k3 { color: var(--k3); } .k4 { color: var(--k4); } .k5 { color: var(--k5); }
.k6 { color: var(--k6); } .k7 { color: var(--k7); } .k8 { color: var(--k8); }
.chart rect { fill: currentColor; }
.hbar { display: block; width: 100%; height: 4px; margin-top: 3px; opacity: .75; }
.hbar rect { fill: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child th, tr:last-child td { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:last-child, th:last-child { padding-right: 0; }
.name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12px;
  overflow-wrap: anywhere; }
.remark { color: var(--soft); font-size: 12px; }
td:first-child { min-width: 240px; }
.facts { width: auto; }
.facts th { font-weight: 500; white-space: nowrap; padding-right: 28px; }
.facts td { overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; font-size: 17px; }
details table { margin-top: 10px; }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""
