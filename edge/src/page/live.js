// The page works without this script, by reload. It keeps the page fresh, writes times in the reader's own zone and makes the slice viewer quick.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripting");
  const byId = (id) => document.getElementById(id);

  const localTimes = () => {
    const today = new Date().toDateString();
    for (const time of document.querySelectorAll("time[datetime]")) {
      const at = new Date(time.dateTime);
      const clock = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
      time.textContent = at.toDateString() === today ? clock : at.toLocaleDateString() + " " + clock;
      time.title = time.dateTime;
    }
  };

  // The slice viewer. Its state is in the address, so that reload and back work.
  const view = () => {
    const figure = byId("slice");
    return figure && { slice: +figure.dataset.slice, last: +figure.dataset.last, window: figure.dataset.window, heatmap: +figure.dataset.heatmap, study: figure.dataset.study };
  };
  let wanted = 0;
  const show = (change) => {
    const now = view();
    if (!now) return;
    const next = { ...now, ...change };
    next.slice = Math.min(Math.max(next.slice, 0), next.last);
    const figure = byId("slice");
    Object.assign(figure.dataset, { slice: next.slice, window: next.window, heatmap: next.heatmap });
    const query = `slice=${next.slice}&window=${next.window}&heatmap=${next.heatmap}`;
    history.replaceState(null, "", `/studies/${next.study}?${query}`);
    const [place, answer] = byId("slider").dataset.answers.split("|")[next.slice].split(",");
    byId("slider").value = next.slice;
    byId("slice-number").textContent = next.slice + 1;
    byId("slice-place").textContent = place;
    byId("slice-answer").textContent = answer;
    byId("mark").setAttribute("x", next.slice);
    byId("picture").alt = `Slice ${next.slice + 1} of ${next.last + 1}, ${next.window} window, ${answer}`;
    for (const link of document.querySelectorAll("a.window")) mark(link, link.dataset.window === next.window, { ...next, window: link.dataset.window });
    mark(byId("heatmap"), next.heatmap === 1, { ...next, heatmap: 1 - next.heatmap });
    byId("heat-note").hidden = next.heatmap !== 1;
    // Only the last one wanted is fetched while the reader drags.
    clearTimeout(wanted);
    wanted = setTimeout(() => { byId("picture").src = `/studies/${next.study}/slices/${next.slice}.png?window=${next.window}&heatmap=${next.heatmap}`; }, 40);
  };
  const mark = (link, isCurrent, to) => {
    if (isCurrent) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    link.href = `/studies/${to.study}?slice=${to.slice}&window=${to.window}&heatmap=${to.heatmap}`;
  };
  const isPlain = (event) => !event.defaultPrevented && !event.ctrlKey && !event.metaKey && !event.altKey && !event.shiftKey;

  document.addEventListener("click", (event) => {
    if (!view() || !isPlain(event)) return;
    const link = event.target.closest("a.window, a.go, #heatmap");
    const strip = event.target.closest("#strip");
    if (link) {
      event.preventDefault();
      if (link.id === "heatmap") show({ heatmap: 1 - view().heatmap });
      else if (link.dataset.window) show({ window: link.dataset.window });
      else show({ slice: +link.dataset.slice });
    } else if (strip) {
      const box = strip.getBoundingClientRect();
      show({ slice: Math.floor((event.clientX - box.left) / box.width * (view().last + 1)) });
    }
  });
  document.addEventListener("input", (event) => { if (event.target.id === "slider") show({ slice: +event.target.value }); });
  document.addEventListener("keydown", (event) => {
    if (!view() || !isPlain(event) || event.target.matches("input")) return;
    const now = view();
    const windows = { 1: "lung", 2: "pe", 3: "mediastinal" };
    if (event.key === "ArrowLeft") show({ slice: now.slice - 1 });
    else if (event.key === "ArrowRight") show({ slice: now.slice + 1 });
    else if (windows[event.key]) show({ window: windows[event.key] });
    else if (event.key === "h" || event.key === "H") show({ heatmap: 1 - now.heatmap });
    else return;
    event.preventDefault();
  });
  document.addEventListener("wheel", (event) => {
    if (!event.target.closest("#picture") || !event.deltaY) return;
    event.preventDefault();
    show({ slice: view().slice + Math.sign(event.deltaY) });
  }, { passive: false });

  // A picture that cannot be drawn says why.
  const explain = async (picture) => {
    const answer = await fetch(picture.src).catch(() => null);
    const words = answer && !answer.ok ? await answer.text() : "";
    byId("no-picture").textContent = `No picture${words && ": " + words}`;
    byId("no-picture").hidden = false;
  };
  document.addEventListener("error", (event) => { if (event.target.id === "picture") explain(event.target); }, true);
  document.addEventListener("load", (event) => { if (event.target.id === "picture") byId("no-picture").hidden = true; }, true);
  if (byId("picture")?.complete && !byId("picture").naturalWidth) explain(byId("picture"));

  // Fresh content: the same address again, its main part put in place, focus and scroll kept. What comes while the slider is dragged waits for its end.
  let shown = byId("main").innerHTML;
  let isFetching = false;
  let isStale = false;
  let isDragging = false;
  const refresh = async () => {
    if (isFetching || isDragging) { isStale = true; return; }
    isFetching = true;
    isStale = false;
    try {
      const address = location.href;
      const answer = await fetch(address, { headers: { Accept: "text/html" } });
      if (answer.redirected) { location.reload(); return; }
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("main");
      if (isDragging || location.href !== address) isStale = true;
      else if (fresh && fresh.innerHTML !== shown) { shown = fresh.innerHTML; replace(fresh); }
    } catch { /* The connection says so by itself. */ }
    setTimeout(() => { isFetching = false; if (isStale) refresh(); }, 1000);
  };
  document.addEventListener("pointerdown", (event) => { isDragging = event.target.id === "slider"; });
  for (const end of ["pointerup", "pointercancel", "change"]) {
    document.addEventListener(end, () => { isDragging = false; if (isStale) refresh(); });
  }
  const replace = (fresh) => {
    const before = +(byId("n-positive")?.dataset.count ?? 0);
    const focused = document.activeElement?.id;
    const picture = byId("picture");
    byId("main").replaceChildren(...fresh.childNodes);
    const drawn = byId("picture");
    if (picture && drawn && drawn.src === picture.src) drawn.replaceWith(picture);
    if (focused) byId(focused)?.focus({ preventScroll: true });
    const after = +(byId("n-positive")?.dataset.count ?? 0);
    if (after > before) byId("announce").textContent = `${after - before === 1 ? "1 new study" : `${after - before} new studies`} with a suspected embolism`;
    localTimes();
  };
  const live = (isOn) => {
    byId("live-mark").className = isOn ? "online" : "offline";
    byId("live-text").textContent = isOn ? "Live" : "Connection lost";
  };
  localTimes();
  if (byId("main").dataset.place !== "SignIn") {
    const events = new EventSource("/events");
    // Also the first time: something may have changed since the page was made.
    events.addEventListener("hello", () => { live(true); refresh(); });
    events.addEventListener("changed", refresh);
    events.addEventListener("error", () => live(false));
    if (byId("main").dataset.place === "System") setInterval(refresh, 10000);
  }
})();
