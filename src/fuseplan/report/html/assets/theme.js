// Light, dark, or as the system has it.

const THEMES = ["auto", "light", "dark"];

function openTheme() {
    const button = byId("theme");
    button.addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(themeNow()) + 1) % THEMES.length]));
    setTheme(recalled("fuseplan-theme"));
}

const themeNow = () => document.documentElement.dataset.theme || "auto";

function setTheme(name) {
    const theme = THEMES.includes(name) ? name : "auto";
    document.documentElement.dataset.theme = theme;
    const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    refill(
        byId("theme"),
        el(`span.theme-${theme}`, { "aria-hidden": "true" }),
        `${theme[0].toUpperCase()}${theme.slice(1)}`,
    );
    byId("theme").setAttribute("aria-label", `Theme: ${theme}. Switch to ${next}`);
    keep("fuseplan-theme", theme);
}

/** A browser may refuse storage to files; then nothing is kept. */
function keep(name, value) {
    try {
        localStorage.setItem(name, value);
    } catch {
        return;
    }
}

function recalled(name) {
    try {
        return localStorage.getItem(name);
    } catch {
        return null;
    }
}
