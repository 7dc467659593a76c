"""The style and the script of a page: light and dark, wide and narrow, values under the pointer, sortable tables."""

from __future__ import annotations

from pretrain.report.chart import PALETTE, RAMP


def _colors(theme: int) -> str:
    named = "".join(f"--c{i}:{pair[theme]};" for i, pair in enumerate(PALETTE))
    return f"{named}--r0:{RAMP[0][theme]};--r1:{RAMP[1][theme]};"


_LIGHT = (
    "--ground:#fff;--panel:#f6f8fa;--text:#1f2328;--soft:#59636e;--rule:#d1d9e0;--grid:#e4e8ec;--link:#0550ae;"
    "--good:#00694d;--bad:#b23c00;--note:#fff4d6;--note-rule:#c99a2e;" + _colors(0)
)
_DARK = (
    "--ground:#0d1117;--panel:#151b23;--text:#e6edf3;--soft:#9da7b3;--rule:#3d444d;--grid:#272e37;--link:#79b8ff;"
    "--good:#3fcf9f;--bad:#ff9b6a;--note:#2b2410;--note-rule:#8a6d1f;" + _colors(1)
)

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(len(PALETTE)))
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:26px;line-height:1.25;margin:8px 0 2px;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px;padding-bottom:4px;border-bottom:1px solid var(--rule)}
h3{font-size:15px;margin:20px 0 6px}
p{margin:6px 0}
a{color:var(--link)}
.sub,.note{color:var(--soft)}
.note{font-size:13px;margin:4px 0 0;overflow-wrap:anywhere}
.heads{display:flex;flex-wrap:wrap;gap:10px;margin:16px 0}
.heads div{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:8px 14px;flex:1 1 150px}
.heads b{display:block;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}
.heads span{color:var(--soft);font-size:13px}
.problems{background:var(--note);border:1px solid var(--note-rule);border-radius:8px;padding:8px 14px;margin:14px 0}
.problems ul{margin:4px 0;padding-left:20px}
.problems li{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:10px 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:22px 26px}
.note+.charts{margin-top:18px}
figure{margin:0;min-width:0}
figcaption{font-weight:600}
.plot{position:relative}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:13px;fill:var(--soft);font-family:inherit;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid)}
.axis{stroke:var(--soft)}
.line{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round}
.dashed{stroke-dasharray:6 3}
.band{fill:var(--c);opacity:.2}
.area{fill:var(--c);opacity:.85}
.dot{fill:var(--c);stroke:var(--ground);stroke-width:1}
.cross{stroke:var(--soft);stroke-dasharray:2 2}
.restart{--c:var(--soft)}.spike{--c:var(--c1)}.event{--c:var(--c4)}
.mark line{stroke:var(--c);stroke-width:1.2;stroke-dasharray:4 3}
.mark path,.mark circle{fill:var(--c)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0 0;padding:0;font-size:13px}
.legend li{overflow-wrap:anywhere}
.key{display:inline-block;width:14px;height:4px;border-radius:2px;background:var(--c);vertical-align:middle;margin-right:6px}
.key.dashed{background:repeating-linear-gradient(90deg,var(--c) 0 5px,transparent 5px 8px)}
.flag{display:inline-block;width:9px;height:9px;background:var(--c);margin-right:6px;
 clip-path:polygon(0 0,100% 0,50% 100%)}
.flag.restart{clip-path:circle(50%)}
.ramp{display:inline-block;width:90px;height:9px;border-radius:3px;vertical-align:middle;
 background:linear-gradient(90deg in oklab,var(--r0),var(--r1))}
.tip{position:absolute;top:20px;pointer-events:none;background:var(--ground);border:1px solid var(--rule);
 border-radius:6px;padding:5px 9px;font-size:12.5px;line-height:1.4;
 box-shadow:0 2px 8px #0003;z-index:2;max-width:75%;white-space:nowrap;
 overflow:hidden;text-overflow:ellipsis;font-variant-numeric:tabular-nums}
.tip[hidden]{display:none}
.scroll{overflow-x:auto;margin:6px 0}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--soft);font-weight:500;border-bottom-color:var(--rule)}
.num{text-align:right;white-space:nowrap}
td.text{overflow-wrap:anywhere;min-width:7em}
.sortable td.text{white-space:nowrap;min-width:0}
tr.strong{font-weight:600}
.sortable th{cursor:pointer}
.sortable th:focus-visible{outline:2px solid var(--link)}
th[aria-sort=ascending]::after{content:" ▲"}
th[aria-sort=descending]::after{content:" ▼"}
.bar{display:inline-block;width:90px;height:9px;background:var(--grid);border-radius:3px;margin-right:8px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--c0)}
.good{color:var(--good)}.bad{color:var(--bad)}
svg.span{display:inline-block;width:110px;height:14px;vertical-align:middle;margin-right:8px}
.span .zero{stroke:var(--soft)}
.span .reach{stroke:currentColor;stroke-width:3}
.span circle{fill:currentColor}
.unclear{color:var(--soft)}
details{margin:10px 0;border:1px solid var(--rule);border-radius:8px;padding:6px 14px}
summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
pre{background:var(--panel);border-radius:8px;padding:10px 14px;overflow-x:auto;font-size:12.5px;line-height:1.45}
pre.sample{white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:50px;color:var(--soft);font-size:13px}
@media(max-width:620px){main{padding:12px 12px 40px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:7px}
 svg text{font-size:15px}.heads b{font-size:18px}.heads div{flex-basis:120px;padding:6px 10px}}
@media print{.tip{display:none}}
"""
)

SCRIPT = """
'use strict';
const say = value => value === null ? '-' : Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3)
  ? value.toExponential(3) : String(+value.toPrecision(5));
document.querySelectorAll('figure:not(.heat)').forEach(figure => {
  const data = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('svg'), tip = figure.querySelector('.tip'), cross = svg.querySelector('.cross');
  const hide = () => { tip.hidden = true; cross.setAttribute('visibility', 'hidden'); };
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    const share = (at - data.span[0]) / (data.span[1] - data.span[0]);
    if (share < -0.02 || share > 1.02) return hide();
    let x = data.ends[0] + share * (data.ends[1] - data.ends[0]);
    if (data.log) x = 10 ** x;
    const found = [];
    for (const one of data.series) {
      let best = -1;
      one.x.forEach((value, i) => { if (best < 0 || Math.abs(value - x) < Math.abs(one.x[best] - x)) best = i; });
      if (best >= 0) found.push({name: one.name, x: one.x[best], y: one.y[best],
        low: one.low && one.low[best], high: one.high && one.high[best]});
    }
    if (!found.length) return hide();
    const near = found.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a).x;
    const rows = found.filter(one => one.x === near);
    const band = one => one.low == null || one.low === one.high ? '' :
      ' (' + say(one.low) + ' to ' + say(one.high) + ')';
    const lines = [data.x + ' ' + (data.names.length ? data.names[near] : near),
      ...rows.slice(0, 14).map(one => one.name + ': ' + say(one.y) + band(one))];
    if (rows.length > 14) lines.push('and ' + (rows.length - 14) + ' more');
    tip.replaceChildren(...lines.map(text => Object.assign(document.createElement('div'), {textContent: text})));
    tip.hidden = false;
    if (at > 0.5) { tip.style.left = ''; tip.style.right = (1 - at) * 100 + 2 + '%'; }
    else { tip.style.right = ''; tip.style.left = at * 100 + 2 + '%'; }
    const view = svg.viewBox.baseVal.width * at;
    cross.setAttribute('x1', view); cross.setAttribute('x2', view); cross.setAttribute('visibility', 'visible');
  });
});
document.querySelectorAll('table.sortable').forEach(table => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const sort = index => {
    const down = heads[index].getAttribute('aria-sort') === 'ascending';
    heads.forEach(head => head.removeAttribute('aria-sort'));
    heads[index].setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const key = row => row.cells[index].dataset.value, number = row => key(row) === '' ? NaN : Number(key(row));
    const rows = [...body.rows], numeric = rows.every(row => key(row) === '' || !isNaN(number(row)));
    rows.sort((a, b) => {
      if (!numeric) return (down ? -1 : 1) * key(a).localeCompare(key(b), undefined, {numeric: true});
      const x = number(a), y = number(b);
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : (down ? -1 : 1) * (x - y);
    });
    body.append(...rows);
  };
  heads.forEach((head, index) => {
    head.tabIndex = 0;
    head.addEventListener('click', () => sort(index));
    head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(index); });
  });
});
"""
