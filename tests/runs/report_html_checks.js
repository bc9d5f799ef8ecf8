// Run inside the page: a list of everything that is wrong with how it is laid out, in words. Empty is well.
(() => {
  const problems = [];
  const say = (what, element) => problems.push(element ? `${what}: ${name(element)}` : what);
  const name = (e) => `<${e.tagName.toLowerCase()}${e.getAttribute("class") ? "." + e.getAttribute("class").replaceAll(" ", ".") : ""}> ${JSON.stringify((e.textContent || "").slice(0, 60))}`;
  const visible = (e) => e.checkVisibility() && e.getClientRects().length > 0;
  const all = [...document.body.querySelectorAll("*")].filter((e) => !["SCRIPT", "STYLE"].includes(e.tagName) && visible(e));
  const outside = all.filter((e) => !e.closest("svg") && !e.closest(".skip"));

  // the page and its boxes
  if (document.scrollingElement.scrollWidth > innerWidth) say(`the page is ${document.scrollingElement.scrollWidth} wide in a window of ${innerWidth}`);
  for (const e of outside) {
    const style = getComputedStyle(e);
    let parent = e.parentElement;
    while (["inline", "contents"].includes(getComputedStyle(parent).display)) parent = parent.parentElement;
    const [mine, theirs] = [e.getBoundingClientRect(), parent.getBoundingClientRect()];
    const hanging = e.tagName === "MARK" ? 16 : 1; // spaces at the end of a line hang over the edge without being seen
    if (mine.right > theirs.right + hanging || mine.left < theirs.left - 1) say(`sticks out of its parent (${mine.left}..${mine.right} in ${theirs.left}..${theirs.right})`, e);
    if (style.display !== "inline" && e.clientWidth && e.scrollWidth > e.clientWidth + 1) say(`holds ${e.scrollWidth} px of content in ${e.clientWidth}`, e);
    const scrolls = ["auto", "scroll"].includes(style.overflowY);
    if (!scrolls && e.tagName !== "INPUT" && style.overflowY !== "visible" && e.scrollHeight > e.clientHeight + 1) say("text is cut off below", e);
    if (scrolls && e.scrollHeight > e.clientHeight && e.tabIndex !== 0) say("scrolls but the keyboard cannot reach it", e);
    if (style.textOverflow === "ellipsis") say("text is shortened", e);
  }
  for (const svg of document.querySelectorAll("svg")) {
    const [box, parent] = [svg.getBoundingClientRect(), svg.parentElement.getBoundingClientRect()];
    if (visible(svg) && box.right > parent.right + 1) say("picture sticks out of its parent", svg);
  }

  // pictures
  const inViewBox = (e) => {
    const box = e.getBBox();
    return { left: box.x, top: box.y, right: box.x + box.width, bottom: box.y + box.height };
  };
  const meet = (a, b, slack) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > slack && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > slack;
  for (const svg of [...document.querySelectorAll("svg.chart")].filter(visible)) {
    const view = svg.viewBox.baseVal;
    const texts = [...svg.querySelectorAll("text")].map((e) => ({ e, box: inViewBox(e) }));
    if (!texts.length) say("picture without words", svg);
    const scale = svg.getScreenCTM().a;
    if (scale * 12 < 9.9) say(`words in a picture are ${scale * 12} px high`, svg);
    for (const { e, box } of [...texts, ...[...svg.querySelectorAll("circle, rect, path")].map((e) => ({ e, box: inViewBox(e) }))]) {
      if (!Object.values(box).every(Number.isFinite)) say("no place in the picture", e);
      if (box.left < -1 || box.top < -1 || box.right > view.width + 1 || box.bottom > view.height + 1) say(`outside its picture (${JSON.stringify(box)} in ${view.width} x ${view.height})`, e);
    }
    texts.forEach((a, i) => texts.slice(i + 1).forEach((b) => meet(a.box, b.box, 1) && say(`words overlap ${name(b.e)}`, a.e)));
    for (const mark of svg.querySelectorAll(".mark")) for (const { e, box } of texts) if (meet(box, inViewBox(mark), 1.5)) say("words lie on a mark", e);
  }
  for (const e of document.querySelectorAll("svg *")) for (const { name: key, value } of e.attributes) if (/NaN|undefined|Infinity|None/.test(value) && key !== "aria-label") say(`${key}="${value}"`, e);

  // words
  const junk = /\b(NaN|undefined|None|null|Infinity|nan|inf)\b|\[object|<bound|<function/;
  const found = junk.exec(document.body.innerText);
  if (found) say(`the page says ${JSON.stringify(document.body.innerText.slice(Math.max(0, found.index - 40), found.index + 40))}`);
  for (const e of document.querySelectorAll("[title], [aria-label]")) for (const key of ["title", "aria-label"]) if (junk.test(e.getAttribute(key) ?? "")) say(`${key} says ${e.getAttribute(key)}`, e);
  for (const e of outside.filter((e) => ["TD", "DD", "LI", "FIGCAPTION", "TH"].includes(e.tagName))) if (!e.innerText.trim()) say("is empty", e);

  // contrast (WCAG 2: at least 4.5 for all text)
  const parse = (color) => {
    const numbers = color.match(/[\d.]+/g).map(Number);
    return { rgb: color.startsWith("color(") ? numbers.slice(0, 3).map((v) => v * 255) : numbers.slice(0, 3), alpha: numbers[3] ?? 1 };
  };
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const { rgb, alpha } = parse(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return rgb;
      if (alpha > 0) say("a half-transparent background behind text is not checked", at);
    }
    return [255, 255, 255];
  };
  for (const e of all) {
    if (![...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim())) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.closest("svg") ? style.fill : style.color);
    const [a, b] = [luminance(ink.rgb), luminance(background(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5 || ink.alpha < 1) say(`contrast ${ratio.toFixed(2)}`, e);
  }

  // structure
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size !== ids.length) say("an id is there twice");
  for (const e of document.querySelectorAll('a[href^="#"]')) if (!document.getElementById(e.hash.slice(1))) say("leads nowhere", e);
  for (const e of document.querySelectorAll("a[href]")) if (!["https:", "file:"].includes(e.protocol)) say(`links to ${e.protocol}`, e);
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map((e) => Number(e.tagName[1]));
  levels.forEach((level, i) => level > (levels[i - 1] ?? 0) + 1 && say(`a heading of level ${level} follows one of level ${levels[i - 1]}`));
  for (const e of document.querySelectorAll('svg[role="img"]')) if (!e.getAttribute("aria-label")) say("picture without a description", e);
  for (const e of document.querySelectorAll("th")) if (!e.getAttribute("scope")) say("table header without scope", e);
  for (const e of document.querySelectorAll("table")) if (!e.caption) say("table without caption", e);
  for (const e of document.querySelectorAll("[aria-labelledby]")) if (!document.getElementById(e.getAttribute("aria-labelledby"))) say("labelled by nothing", e);
  for (const e of document.querySelectorAll("[style]")) say("inline style", e);
  if (!document.documentElement.lang) say("no language");
  return problems;
})();
