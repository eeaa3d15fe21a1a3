// Elements. Texts become text nodes: nothing that a model is called can become markup.

const SVG = "http://www.w3.org/2000/svg";

/** `el("div.name.other", {title: "..."}, child, "text", ...)`; attributes may be left out. No button sends a form. */
function el(kind, ...parts) {
    const [tag, ...classes] = kind.split(".");
    const element = document.createElement(tag);
    if (tag === "button") element.type = "button";
    return furnish(element, classes, parts);
}

/** The same for SVG. */
function svg(kind, ...parts) {
    const [tag, ...classes] = kind.split(".");
    return furnish(document.createElementNS(SVG, tag), classes, parts);
}

/** Sets attributes: functions listen, `style` sets properties, false and null are left out. */
function furnish(element, classes, parts) {
    const attributes = parts[0]?.constructor === Object ? parts[0] : null;
    if (classes.length) element.setAttribute("class", classes.join(" "));
    for (const [name, value] of Object.entries(attributes || {})) {
        if (typeof value === "function") element.addEventListener(name.slice(2), value);
        else if (name === "style")
            for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
        else if (value !== null && value !== undefined && value !== false)
            element.setAttribute(name, value === true ? "" : value);
    }
    refill(element, attributes ? parts.slice(1) : parts);
    return element;
}

const byId = (id) => document.getElementById(id);

/** Puts children in the place of those that are there. */
function refill(element, ...children) {
    element.replaceChildren(
        ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
    );
}

/** A name that may break after its signs. */
function breakable(name) {
    return name.split(/(?<=[_.,(])/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
}

const code = (name) => el("span.code", breakable(name));

/** The colour of a rule, with its name beside it wherever it is used. */
const swatch = (rule) => el("span.swatch", { "data-rule": ruleHue(rule), "aria-hidden": "true" });

const ruleName = (rule) => el("span.rule", swatch(rule), code(rule));

/** A list with what `draw` makes of each item, in an item of class `now` where it is the one at hand; null of none. */
const list = (kind, items, draw, isNow = () => false) =>
    items.length
        ? el(
              kind,
              items.map((item) => el(isNow(item) ? "li.now" : "li", draw(item))),
          )
        : null;

/** Names, each with how often it is there. */
const counted = (rows) => list("ul.counts", rows, ([name, count]) => [el("b", number(count)), " ", code(name)]);

const nodeNames = (nodes) => el("p.nodes", nodes.map(code));

/** One of several choices that exclude each other. */
const radio = (name, value, checked, onchange, label) =>
    el("label.segment", el("input", { type: "radio", name, value, checked, onchange }), label);

/** A table of `columns`, each a title or [title, class], and rows. */
function table(kind, columns, rows) {
    const head = columns.flatMap((column) => {
        const [title, name] = [column].flat();
        return el(name ? `th.${name}` : "th", { scope: "col" }, title);
    });
    return el(`table.${kind}`, el("thead", el("tr", head)), el("tbody", rows));
}

/** What may be wider than the page: it scrolls by itself, and keys reach it while it has to. */
function reachable(element) {
    new ResizeObserver(() => (element.tabIndex = element.scrollWidth > element.clientWidth ? 0 : -1)).observe(element);
    return element;
}

/** Says something to who can't see what changed. */
function announce(text) {
    byId("live").textContent = text;
}
