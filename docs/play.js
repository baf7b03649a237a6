// The two figures of play.md: no library, no network. The formulas are those of the notebooks, and
// a test holds them to the Python package; SVG takes its colours from the theme.
"use strict";

const rhoPlay = (() => {
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const mean = (values) => sum(values) / values.length;

  // s rho^|i-j|
  const covariance = (s, rho, d) => range(d).map((i) => range(d).map((j) =>
    s * rho ** Math.abs(i - j)));

  // First column sqrt(s) rho^i, the others sqrt(s (1 - rho^2)) rho^(i-j).
  const cholesky = (s, rho, d) => range(d).map((i) => range(d).map((j) =>
    i < j ? 0 : Math.sqrt(s * (j === 0 ? 1 : 1 - rho * rho)) * rho ** (i - j)));

  // y_1 = e_1, y_j = rho y_{j-1} + sqrt(1 - rho^2) e_j, and z_j = mean + sqrt(s) y_j.
  function chain(noise, { s, rho, location = 0 }) {
    const fresh = Math.sqrt(1 - rho * rho);
    let y = 0;
    return noise.map((e, j) => {
      y = j === 0 ? e : rho * y + fresh * e;
      return location + Math.sqrt(s) * y;
    });
  }

  // The parts of (2.3), the volume split as in (2.4), and what (4.3) charges in a batch; in nats.
  function kl({ d, s, rho, location = 0 }, batch = 128) {
    const place = (d * location * location) / 2;
    const spread = (d * (s - 1)) / 2;
    const volume = (-d * Math.log(s)) / 2;
    const correlation = (-(d - 1) * Math.log1p(-rho * rho)) / 2;
    const rest = spread + volume + correlation;
    const [total, charged] = [place + rest, place + rest / batch];
    return { place, spread, volume, correlation, total, charged };
  }

  // Eigenvalues of R(rho), 0 <= rho < 1, largest first: (1 - rho^2) / (1 - 2 rho cos w + rho^2)
  // where (d + 1) w + 2 arg(1 - rho exp(-iw)) = k pi, by bisection; the left side grows with w.
  function eigenvalues(rho, d) {
    return range(d).map((k) => {
      let low = (k * Math.PI) / (d + 1);
      let high = ((k + 1) * Math.PI) / (d + 1);
      for (let round = 0; round < 48; round++) {
        const w = (low + high) / 2;
        const phase = 2 * Math.atan2(rho * Math.sin(w), 1 - rho * Math.cos(w));
        if ((d + 1) * w + phase < (k + 1) * Math.PI) low = w;
        else high = w;
      }
      const half = Math.sin((low + high) / 4); // 1 - 2 rho cos w + rho^2 without cancellation
      return (1 - rho * rho) / ((1 - rho) ** 2 + 4 * rho * half * half);
    });
  }

  // Theorem 1, (7.4), and Theorem 2, (7.6). Both lists sorted alike, in nats.
  function fixedPrice(shape, variances) {
    const ratio = shape.map((c, i) => c / variances[i]);
    return 0.5 * (ratio.length * Math.log(mean(ratio)) - sum(ratio.map(Math.log)));
  }
  function trainedPrice(shape, variances) {
    const root = shape.map((c, i) => Math.sqrt(c / variances[i]));
    return root.length * Math.log(mean(root)) - sum(root.map(Math.log));
  }

  // The rho of the smallest price: a grid, refined around its best point.
  function bestRho(variances, price) {
    let [low, high] = [0, 1 - 1e-9];
    const at = (rho) => price(eigenvalues(rho, variances.length), variances);
    while (high - low > 1e-9) {
      const grid = range(24).map((i) => low + ((high - low) * i) / 23);
      const prices = grid.map(at);
      const best = prices.indexOf(Math.min(...prices));
      [low, high] = [grid[Math.max(best - 1, 0)], grid[Math.min(best + 1, 23)]];
    }
    return [(low + high) / 2, at((low + high) / 2)];
  }

  // Posterior variances up to a factor, largest first: 1 / lambda_i of the d largest eigenvalues.
  const powerLaw = (exponent, d) => range(d).map((i) => (d - i) ** exponent);
  const fromSpectrum = (spectrum, d) => spectrum.slice(0, d).map((value) => 1 / value).reverse();

  // Standard normal numbers, the same for the same seed (mulberry32, Box and Muller).
  function normals(count, seed) {
    let state = seed;
    const uniform = () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
    };
    return range(count).map(() =>
      Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
  }

  return {
    range, mean, covariance, cholesky, chain, kl, eigenvalues, fixedPrice, trainedPrice,
    bestRho, powerLaw, fromSpectrum, normals,
  };
})();

if (typeof document !== "undefined") {
  const { range, mean } = rhoPlay;
  const find = (id) => document.getElementById(id);
  const text = (value, digits) => {
    const rounded = value.toFixed(digits);
    return (Number(rounded) === 0 ? rounded.replace("-", "") : rounded).replace("-", "−");
  };
  const short = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
  const line = (points, name) => {
    const places = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`);
    return `<polyline class="${name}" points="${places.join(" ")}"/>`;
  };

  // Say a slider's value beside it, and to a screen reader.
  function say(id, value) {
    find(id).setAttribute("aria-valuetext", value);
    find(`${id}-value`).textContent = value;
  }

  // Axes in a box that is 200 high; x and y map numbers to places.
  function frame(width, [x0, x1], [y0, y1], xTicks, yTicks, xLabel, yLabel) {
    const right = width - 6;
    const x = (value) => 34 + ((right - 34) * (value - x0)) / (x1 - x0);
    const y = (value) => 170 - (162 * (value - y0)) / (y1 - y0);
    const ticks = [
      ...xTicks.map(([value, label]) =>
        `<line class="grid" x1="${x(value)}" x2="${x(value)}" y1="8" y2="170"/>`
        + `<text x="${x(value)}" y="184" text-anchor="middle">${label}</text>`),
      ...yTicks.map(([value, label]) =>
        `<line class="grid" x1="34" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>`
        + `<text x="29" y="${y(value) + 4}" text-anchor="end">${label}</text>`),
    ];
    const labels = `<text x="${right}" y="197" text-anchor="end">${xLabel}</text>`
      + `<text class="above" x="38" y="19">${yLabel}</text>`;
    const show = (id, marks) => { find(id).innerHTML = ticks.join("") + marks + labels; };
    return { x, y, right, show };
  }

  // A matrix as squares: the stronger the colour, the larger the entry; below it the scale.
  function matrix(id, rows, largest) {
    const square = (value, x, y, width, height) => {
      const strength = Math.abs(value);
      return strength < 0.004 ? "" : `<rect class="${value < 0 ? "negative" : "positive"}"`
        + ` x="${x.toFixed(2)}" y="${y.toFixed(2)}" width="${width.toFixed(2)}"`
        + ` height="${height.toFixed(2)}" fill-opacity="${strength.toFixed(3)}"/>`;
    };
    const side = 180 / rows.length;
    const cells = rows.flatMap((row, i) => row.map((value, j) =>
      square(value / largest, 20 + j * side, 4 + i * side, side, side)));
    const scale = range(30).map((k) => square((k - 14.5) / 14.5, 50 + 4 * k, 190, 4, 7));
    find(id).innerHTML = '<rect class="edge" x="20" y="4" width="180" height="180"/>'
      + cells.join("") + scale.join("")
      + `<text x="46" y="198" text-anchor="end">−${short(largest)}</text>`
      + `<text x="174" y="198">${short(largest)}</text>`;
  }

  const z = (place) => `z<tspan dy="3" class="sub">${place}</tspan>`;
  let seed = 1;

  function drawChain() {
    const d = Number(find("play-d").value);
    const s = 10 ** Number(find("play-s").value);
    const rho = Number(find("play-rho").value);
    const location = Number(find("play-mean").value);
    const q = { d, s, rho, location };
    say("play-rho", text(rho, 2));
    say("play-s", short(s));
    say("play-d", String(d));
    say("play-mean", text(location, 1));

    matrix("play-covariance", rhoPlay.covariance(s, rho, d), s);
    matrix("play-cholesky", rhoPlay.cholesky(s, rho, d), Math.sqrt(s));

    const noise = rhoPlay.normals(32 * 160, seed);
    const draws = range(160).map((k) => rhoPlay.chain(noise.slice(32 * k, 32 * k + d), q));
    const ticks = [-2, 0, 2].map((value) => [value, text(value, 0)]);
    const places = [1, ...[5, 10, 15, 20, 25, 30].filter((place) => place <= d)].map((j) => [j, j]);
    const paths = frame(220, [1, d], [-4, 4], places, ticks, "place j", z("j"));
    const [top, bottom] = [1, -1].map((side) => paths.y(location + 2 * side * Math.sqrt(s)));
    const across = (value) => [[34, paths.y(value)], [paths.right, paths.y(value)]];
    const drawn = draws.slice(0, 12).map((draw, k) =>
      line(draw.map((y, j) => [paths.x(j + 1), paths.y(y)]), k < 2 ? "draw first" : "draw"));
    paths.show("play-draws", '<g clip-path="url(#play-clip)">'
      + `<rect class="band" x="34" width="180" y="${top}" height="${bottom - top}"/>`
      + line(across(2), "prior") + line(across(-2), "prior") + drawn.join("") + "</g>");

    const reach = (4 * 180) / 162; // one unit is as long to the right as upwards
    const plane = frame(220, [-reach, reach], [-4, 4], ticks, ticks, z(1), z(2));
    const ellipse = (correlation, radius, centre) => range(73).map((k) => {
      const [e1, e2] = [Math.cos, Math.sin].map((wave) => radius * wave((k * Math.PI) / 36));
      const e = correlation * e1 + Math.sqrt(1 - correlation * correlation) * e2;
      return [plane.x(centre + e1), plane.y(centre + e)];
    });
    const points = draws.map(([first, second]) =>
      `<circle class="point" r="1.4" cx="${plane.x(first)}" cy="${plane.y(second)}"/>`);
    plane.show("play-ellipse", `<g clip-path="url(#play-clip)">${points.join("")}`
      + line(ellipse(0, 2, 0), "prior") + line(ellipse(rho, 2 * Math.sqrt(s), location), "contour")
      + "</g>");

    const parts = rhoPlay.kl(q);
    for (const name of ["place", "spread", "volume", "correlation"]) {
      find(`play-${name}`).textContent = text(parts[name], 3);
      const charged = name === "place" ? parts.place : parts[name] / 128;
      find(`play-${name}-charged`).textContent = text(charged, 3);
    }
    find("play-total").textContent = text(parts.total, 3);
    find("play-total-charged").textContent = text(parts.charged, 3);
    find("play-trace").textContent = short(s * d);
    find("play-logdet").textContent = text(-2 * (parts.volume + parts.correlation), 3);
  }

  function drawPrice() {
    const kind = find("price-spectrum").value;
    const d = Number(find("price-d").value);
    const exponent = Number(find("price-exponent").value);
    find("price-exponent").disabled = kind !== "power";
    say("price-d", String(d));
    say("price-exponent", kind === "power" ? text(exponent, 2) : "–");
    const variances = kind === "power"
      ? rhoPlay.powerLaw(exponent, d) : rhoPlay.fromSpectrum(globalThis.rhoSpectra[kind], d);
    const flat = variances.map(() => 1);
    const theorems = [["fixed", rhoPlay.fixedPrice], ["trained", rhoPlay.trainedPrice]];
    const columns = theorems.map(([name, price]) => {
      const [rho, chain] = rhoPlay.bestRho(variances, price);
      const isotropic = price(flat, variances);
      find(`price-isotropic-${name}`).textContent = text(isotropic, 3);
      find(`price-chain-${name}`).textContent = text(chain, 3);
      find(`price-rho-${name}`).textContent = text(rho, 3);
      return { price, rho, chain, isotropic };
    });

    // The variances of each family at the scale of Theorem 1, where the largest true one is 1.
    const scaled = (shape) => {
      const factor = 1 / mean(shape.map((c, i) => c / variances[i]));
      return shape.map((c) => Math.log10((c * factor) / variances[0]));
    };
    const truth = variances.map((v) => Math.log10(v / variances[0]));
    const chain = scaled(rhoPlay.eigenvalues(columns[0].rho, d));
    const isotropic = scaled(flat);
    const every = [...truth, ...chain, ...isotropic];
    const least = Math.floor(Math.min(-1, ...every));
    const step = Math.ceil(-least / 5);
    const powers = range(Math.floor(-least / step) + 1).map((k) =>
      [-k * step, k ? `10<tspan dy="-4" class="sub">−${k * step}</tspan>` : "1"]);
    const places = [1, ...[5, 10, 20, 30, 40, 50].filter((i) => i <= d && (i > 5 || d < 20))];
    const left = frame(
      340, [0.5, d + 0.5], [least, Math.max(0.4, ...every) + 0.1], places.map((i) => [i, i]),
      powers, "direction", "variance",
    );
    const place = (value, i) => [left.x(i + 1), left.y(value)];
    const dots = truth.map(place).map(([x, y]) =>
      `<circle class="truth" r="2.2" cx="${x}" cy="${y}"/>`);
    left.show("price-variances",
      line(isotropic.map(place), "isotropic") + line(chain.map(place), "chain") + dots.join(""));

    const top = 1.3 * Math.max(0.05, columns[0].isotropic);
    const unit = 10 ** Math.floor(Math.log10(top));
    const by = unit * (top / unit > 5 ? 2 : top / unit > 2 ? 1 : 0.5);
    const heights = range(Math.floor(top / by) + 1).map((k) => [k * by, short(k * by)]);
    const right = frame(
      340, [0, 1], [-0.04 * top, top], [0, 0.25, 0.5, 0.75, 1].map((rho) => [rho, rho]),
      heights, "ρ", "price (nats)",
    );
    const dot = (rho, price, name) =>
      `<circle class="${name}" r="4" cx="${right.x(rho)}" cy="${right.y(price)}"/>`;
    const rhos = [...range(60).map((k) => k / 60), 0.99];
    const shapes = rhos.map((rho) => rhoPlay.eigenvalues(rho, d));
    const curves = columns.map((column, k) => {
      const prices = shapes.map((shape) => Math.min(column.price(shape, variances), 2 * top));
      const points = prices.map((price, i) => [right.x(rhos[i]), right.y(price)]);
      return line(points, k ? "chain late" : "chain")
        + dot(column.rho, column.chain, "best") + dot(0, column.isotropic, "round");
    });
    right.show("price-curve", '<g clip-path="url(#price-clip)">'
      + line([[34, right.y(0)], [right.right, right.y(0)]], "diagonal") + curves.join("") + "</g>");
  }

  // One drawing a frame, however fast the sliders move.
  function follow(ids, draw) {
    let waiting = false;
    const ask = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; draw(); });
    };
    for (const id of ids) find(id).addEventListener("input", ask);
    return ask;
  }

  const again = follow(["play-rho", "play-s", "play-d", "play-mean"], drawChain);
  find("play-noise").addEventListener("click", () => { seed += 1; again(); });
  follow(["price-spectrum", "price-exponent", "price-d"], drawPrice);
  drawChain();
  drawPrice();
}
